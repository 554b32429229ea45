#include "cpu/symmetric_eigen.h"

#include <ATen/Config.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/native/BatchLinearAlgebra.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/divide_conquer.h"
#include "cpu/solver_loops.h"
#include "cpu/tridiagonal.h"

namespace himo::cpu {
namespace {

constexpr int64_t kTile = 32;  // a square tile is 8 KiB in float64 and fits the L1 cache

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

void solve_by_lapack(double* matrix, double* eigenvalues, int64_t n, double* work) {
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

// Writes rows `sorted` of `rows` as columns, in descending order, in whole cache lines of both.
void write_columns(const double* rows, int64_t stride, const int64_t* sorted, int64_t n,
                   double* matrix) {
  at::parallel_for(0, at::divup(n, kLanePadding), at::divup(4096, n),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t j = begin * kLanePadding; j < std::min(n, end * kLanePadding);
                          j += kLanePadding) {
                       const double* columns[kLanePadding];
                       const int64_t count = std::min(kLanePadding, n - j);
                       for (int64_t k = 0; k < count; ++k)
                         columns[k] = rows + sorted[n - 1 - j - k] * stride;
                       if (count == kLanePadding) {
                         solver_loops().interleave(columns, n, matrix + j, n);
                         continue;
                       }
                       for (int64_t i = 0; i < n; ++i) {
                         for (int64_t k = 0; k < count; ++k) matrix[i * n + j + k] = columns[k][i];
                       }
                     }
                   });
}

int64_t himo_work(int64_t n) {
  const int64_t rows = n * solver_stride(n);
  const int64_t after = std::max(divide_conquer_work(n), back_transform_work(n));
  return 3 * round_up(n) + std::max(tridiagonalise_work(n), rows + after);
}

void solve_by_himo(double* matrix, double* eigenvalues, int64_t n, double* work) {
  const int64_t stride = solver_stride(n);
  double* diagonal = work;
  double* off_diagonal = diagonal + round_up(n);
  double* factors = off_diagonal + round_up(n);
  double* rows = factors + round_up(n);  // [n, stride]
  double* scratch = rows + n * stride;
  // Scale by a power of two, so that squares neither overflow nor underflow.
  const double size = solver_loops().largest(matrix, n * n);
  int exponent = 0;
  if (size > 0) std::frexp(size, &exponent);
  const double scale = std::ldexp(1.0, std::clamp(-exponent, -1022, 1022));
  std::vector<int64_t> sorted(n);
  tridiagonalise(matrix, n, scale, diagonal, off_diagonal, factors, rows);
  solve_tridiagonal(diagonal, off_diagonal, n, rows, sorted.data(), scratch);
  back_transform(matrix, factors, n, rows, stride, scratch);
  for (int64_t i = 0; i < n; ++i) eigenvalues[i] = diagonal[sorted[n - 1 - i]] / scale;
  write_columns(rows, stride, sorted.data(), n, matrix);
}

// Returns the smallest side for which our solver was measured faster than LAPACK, with one and with
// two threads. himo_kernels/pca/README.md has the times. On Intel's processors with AVX-512, where
// MKL uses its widest registers, it has not been measured.
int64_t smallest_side() {
  const auto capability = at::get_cpu_capability();
#ifdef HIMO_X86_TILE_LOOPS
  if (capability == "AVX512" && __builtin_cpu_is("intel")) return kLargestSide + 1;
#endif
  return capability == "AVX512" || capability == "AVX2" ? 32 : 128;
}

}  // namespace

Eigensolver fastest_eigensolver(int64_t n) {
  static const int64_t smallest = smallest_side();
  return n >= smallest ? Eigensolver::kHimo : Eigensolver::kLapack;
}

int64_t solver_work(int64_t n, Eigensolver solver) {
  return solver == Eigensolver::kHimo ? himo_work(n) : lapack_work(n);
}

void solve_symmetric(double* matrix, double* eigenvalues, int64_t n, double* work,
                     Eigensolver solver) {
  if (solver == Eigensolver::kHimo) return solve_by_himo(matrix, eigenvalues, n, work);
  return solve_by_lapack(matrix, eigenvalues, n, work);
}

}  // namespace himo::cpu
