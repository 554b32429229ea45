// Matrix products on raw memory. They use torch's BLAS, or our AVX-512 code on processors where
// that uses only 256-bit registers. Inside at::parallel_for a call runs on the calling thread,
// elsewhere on all threads.
#pragma once

#include <cstdint>

namespace himo::cpu {

// A view of memory as a matrix; one of the strides is 1.
template <typename T>
struct Matrix {
  T* data;
  int64_t rows, columns;
  int64_t row_stride, column_stride;

  operator Matrix<const T>() const { return {data, rows, columns, row_stride, column_stride}; }
  Matrix t() const { return {data, columns, rows, column_stride, row_stride}; }
  Matrix row_block(int64_t from, int64_t count) const {
    return {data + from * row_stride, count, columns, row_stride, column_stride};
  }
  Matrix column_block(int64_t from, int64_t count) const { return t().row_block(from, count).t(); }
};

template <typename T>
Matrix<T> row_major(T* data, int64_t rows, int64_t columns) {
  return {data, rows, columns, columns, 1};
}

// out = alpha a b + beta out. With beta = 0, out is not read. Views must not be empty.
void multiply(Matrix<const float> a, Matrix<const float> b, Matrix<float> out, float alpha = 1,
              float beta = 0);
void multiply(Matrix<const double> a, Matrix<const double> b, Matrix<double> out, double alpha = 1,
              double beta = 0);

}  // namespace himo::cpu
