#include "cpu/dense.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/from_blob.h>

#include <type_traits>

#include "cpu/centring.h"
#include "cpu/wide_products.h"

namespace himo::cpu {
namespace {

// With fewer multiplications a plain loop is faster than a BLAS call.
constexpr int64_t kSmallProduct = 4096;

template <typename T>
at::Tensor view(Matrix<T> matrix) {
  using scalar_t = std::remove_const_t<T>;
  return at::from_blob(const_cast<scalar_t*>(matrix.data), {matrix.rows, matrix.columns},
                       {matrix.row_stride, matrix.column_stride},
                       at::TensorOptions(c10::CppTypeToScalarType<scalar_t>::value));
}

// out and b are row-major.
template <typename T>
HIMO_WIDE void multiply_rows(Matrix<const T> a, Matrix<const T> b, Matrix<T> out, T alpha, T beta) {
  for (int64_t i = 0; i < out.rows; ++i) {
    T* row = out.data + i * out.row_stride;
    for (int64_t j = 0; j < out.columns; ++j) row[j] = beta == 0 ? 0 : beta * row[j];
    for (int64_t k = 0; k < a.columns; ++k) {
      const T factor = alpha * a.data[i * a.row_stride + k * a.column_stride];
      const T* line = b.data + k * b.row_stride;
      for (int64_t j = 0; j < out.columns; ++j) row[j] += factor * line[j];
    }
  }
}

template <typename T>
void multiply_small(Matrix<const T> a, Matrix<const T> b, Matrix<T> out, T alpha, T beta) {
  if (b.column_stride == 1 && out.column_stride == 1) return multiply_rows(a, b, out, alpha, beta);
  if (a.row_stride == 1 && out.row_stride == 1) {
    return multiply_rows(b.t(), a.t(), out.t(), alpha, beta);
  }
  for (int64_t i = 0; i < out.rows; ++i) {
    for (int64_t j = 0; j < out.columns; ++j) {
      T sum = 0;
      for (int64_t k = 0; k < a.columns; ++k) {
        sum += a.data[i * a.row_stride + k * a.column_stride] *
               b.data[k * b.row_stride + j * b.column_stride];
      }
      T& entry = out.data[i * out.row_stride + j * out.column_stride];
      entry = beta == 0 ? alpha * sum : alpha * sum + beta * entry;
    }
  }
}

template <typename T>
void multiply_any(Matrix<const T> a, Matrix<const T> b, Matrix<T> out, T alpha, T beta) {
  if (out.rows * out.columns * a.columns <= kSmallProduct) {
    return multiply_small(a, b, out, alpha, beta);
  }
  if (multiplies_wide()) {
    if (out.column_stride == 1) return multiply_wide(a, b, out, alpha, beta);
    return multiply_wide(b.t(), a.t(), out.t(), alpha, beta);
  }
  auto result = view(out);
  at::cpu::addmm_out(result, result, view(a), view(b), beta, alpha);
}

}  // namespace

void multiply(Matrix<const float> a, Matrix<const float> b, Matrix<float> out, float alpha,
              float beta) {
  multiply_any(a, b, out, alpha, beta);
}

void multiply(Matrix<const double> a, Matrix<const double> b, Matrix<double> out, double alpha,
              double beta) {
  multiply_any(a, b, out, alpha, beta);
}

}  // namespace himo::cpu
