// Tensors as matrices, and loops over rows. T is float or double.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include "cpu/centring.h"
#include "cpu/dense.h"
#include "cpu/pca_problem.h"

namespace himo::cpu {

// A matrix with a stride of 1; a copy if need be, which `owner` keeps.
template <typename T>
Matrix<const T> readable(const at::Tensor& tensor, at::Tensor& owner) {
  const bool rows = tensor.stride(1) == 1 || tensor.size(1) == 1;
  const bool columns = tensor.stride(0) == 1 || tensor.size(0) == 1;
  owner = rows || columns ? tensor : tensor.contiguous();
  const T* data = owner.const_data_ptr<T>();
  if (!rows && columns) return {data, owner.size(0), owner.size(1), 1, owner.stride(1)};
  return {data, owner.size(0), owner.size(1), owner.stride(0), 1};
}

// A matrix whose rows, or columns, are contiguous.
template <typename T>
Matrix<T> writable(const at::Tensor& tensor) {
  at::Tensor same;
  const auto view = readable<T>(tensor, same);
  return {tensor.mutable_data_ptr<T>(), view.rows, view.columns, view.row_stride,
          view.column_stride};
}

// out = alpha a b + beta out, for matrices of one dtype.
void multiply(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out, double alpha,
              double beta);

// Returns the columns [from, from + count) of V [n, count] in the dtype of the products.
template <typename T>
at::Tensor directions(const Spectrum& spectrum, int64_t from, int64_t count);

// Calls body(first, last) for ranges of the rows, in parallel.
template <typename Body>
void for_rows(int64_t rows, int64_t columns, const Body& body) {
  at::parallel_for(0, rows, grain(columns), body);
}

// In float64.
template <typename T, typename other_t>
double dot(const T* a, const other_t* b, int64_t size);

// out += factor x
template <typename T, typename sum_t>
void add_multiple(double factor, const T* x, int64_t size, sum_t* out);

template <typename T>
void scale_row(const T* row, double factor, int64_t size, T* out);

}  // namespace himo::cpu
