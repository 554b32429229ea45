// Small dense linear algebra on memory, through torch's BLAS and LAPACK, or AVX-512 of our own
// where those use half of its width. Inside at::parallel_for a call runs on the one thread it is
// made from, elsewhere on all of them.
#pragma once

#include <cstdint>

namespace himo::cpu {

// A view of memory as a matrix; either stride is 1.
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

// out = alpha a b + beta out. beta = 0 does not read out. No view is empty.
void multiply(Matrix<const float> a, Matrix<const float> b, Matrix<float> out, float alpha = 1,
              float beta = 0);
void multiply(Matrix<const double> a, Matrix<const double> b, Matrix<double> out, double alpha = 1,
              double beta = 0);

// Returns whether solve_symmetric of an n x n matrix is cpu/symmetric_eigen.h on this processor;
// elsewhere it is LAPACK.
bool solves_wide(int64_t n);

// Returns how many doubles solve_symmetric needs as work; n <= kLargestSide.
int64_t solver_work(int64_t n);

// The length of LAPACK's work array, 1 + 6 n + 2 n^2, is a 32-bit integer.
constexpr int64_t kLargestSide = 32766;

// Replaces the symmetric matrix by its eigenvectors in columns, ordered by descending eigenvalue.
// Entries are finite: LAPACK, where it is used, throws where it does not converge, and the solver
// of cpu/symmetric_eigen.h has no answer for them.
void solve_symmetric(double* matrix,       // [n, n], row-major
                     double* eigenvalues,  // [n], descending
                     int64_t n,
                     double* work);  // [solver_work(n)]

}  // namespace himo::cpu
