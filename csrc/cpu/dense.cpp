#include "cpu/dense.h"

#include <ATen/Config.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/BatchLinearAlgebra.h>
#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "cpu/centring.h"
#include "cpu/symmetric_eigen.h"
#include "cpu/wide_products.h"

namespace himo::cpu {
namespace {

constexpr int64_t kTile = 32;  // a square tile is 8 KiB in float64 and fits the L1 cache
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

// out[i][j] = in[n - 1 - j][i]: converts LAPACK's ascending columns to descending columns of a
// row-major matrix. In tiles, so that cache lines of both matrices are used fully.
void reverse_transpose(const double* in, double* out, int64_t n) {
  for (int64_t i0 = 0; i0 < n; i0 += kTile) {
    for (int64_t j0 = 0; j0 < n; j0 += kTile) {
      const int64_t i1 = std::min(i0 + kTile, n), j1 = std::min(j0 + kTile, n);
      for (int64_t i = i0; i < i1; ++i) {
        for (int64_t j = j0; j < j1; ++j) out[i * n + j] = in[(n - 1 - j) * n + i];
      }
    }
  }
}

int64_t lapack_work(int64_t n) { return 1 + 6 * n + 2 * n * n; }

// For smaller n LAPACK is as fast.
constexpr int64_t kSmallestWideSide = 16;

}  // namespace

bool solves_wide(int64_t n) { return n >= kSmallestWideSide && multiplies_wide(); }

void multiply(Matrix<const float> a, Matrix<const float> b, Matrix<float> out, float alpha,
              float beta) {
  multiply_any(a, b, out, alpha, beta);
}

void multiply(Matrix<const double> a, Matrix<const double> b, Matrix<double> out, double alpha,
              double beta) {
  multiply_any(a, b, out, alpha, beta);
}

int64_t solver_work(int64_t n) {
  return solves_wide(n) ? solve_symmetric_wide_work(n) : lapack_work(n);
}

void solve_symmetric(double* matrix,       // [n, n]
                     double* eigenvalues,  // [n]
                     int64_t n,
                     double* work) {  // [solver_work(n)]
  if (solves_wide(n)) return solve_symmetric_wide(matrix, eigenvalues, n, work);
#if AT_BUILD_WITH_LAPACK()
  std::vector<int> integers(3 + 5 * n);
  const int size = static_cast<int>(n);
  int info = 0;
  at::native::lapackSyevd<double, double>(
      'V', 'L', size, matrix, size, eigenvalues, work, static_cast<int>(lapack_work(n)), nullptr, 0,
      integers.data(), static_cast<int>(integers.size()), &info);
  TORCH_CHECK_LINALG(info == 0, "pca: LAPACK's syevd of a ", n, " x ", n,
                     " matrix did not converge (info ", info, ")");
  std::copy(matrix, matrix + n * n, work);
  reverse_transpose(work, matrix, n);
  std::reverse(eigenvalues, eigenvalues + n);
#else
  TORCH_CHECK(false, "pca: this torch is built without LAPACK");
#endif
}

}  // namespace himo::cpu
