#include "cpu/symmetric_eigen.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/divide_conquer.h"
#include "cpu/tridiagonal.h"
#include "cpu/wide_lanes.h"

namespace himo::cpu {
namespace {

HIMO_AVX512 double largest(const double* values, int64_t count) {
  Lanes even{}, odd{};
  int64_t i = 0;
  for (; i + 2 * kLaneCount <= count; i += 2 * kLaneCount) {
    const Lanes a = load(values + i), b = load(values + i + kLaneCount);
    even = a > even ? a : even;
    even = -a > even ? -a : even;
    odd = b > odd ? b : odd;
    odd = -b > odd ? -b : odd;
  }
  double result = 0;
  for (int64_t k = 0; k < kLaneCount; ++k) result = std::max({result, even[k], odd[k]});
  for (; i < count; ++i) result = std::max(result, std::abs(values[i]));
  return result;
}

// out[i][k] = columns[k][i], in whole cache lines of both sides.
HIMO_AVX512 void write_columns(const double* const* columns, int64_t count, int64_t n,
                               double* out) {
  for (int64_t i = 0; i < n; ++i) {
    double* row = out + i * n;
    if (count == kLaneCount) {
      const Lanes values = {columns[0][i], columns[1][i], columns[2][i], columns[3][i],
                            columns[4][i], columns[5][i], columns[6][i], columns[7][i]};
      store(row, values);
    } else {
      for (int64_t k = 0; k < count; ++k) row[k] = columns[k][i];
    }
  }
}

}  // namespace

int64_t solve_symmetric_wide_work(int64_t n) {
  const int64_t rows = n * solver_stride(n);
  const int64_t after = std::max(divide_conquer_work(n), back_transform_work(n));
  return 3 * round_up(n) + std::max(tridiagonalise_work(n), rows + after);
}

void solve_symmetric_wide(double* matrix, double* eigenvalues, int64_t n, double* work) {
  const int64_t stride = solver_stride(n);
  double* diagonal = work;
  double* off_diagonal = diagonal + round_up(n);
  double* factors = off_diagonal + round_up(n);
  double* rows = factors + round_up(n);  // [n, stride]
  double* scratch = rows + n * stride;
  // Scale by a power of two, so that squares neither overflow nor underflow.
  const double size = largest(matrix, n * n);
  int exponent = 0;
  if (size > 0) std::frexp(size, &exponent);
  const double scale = std::ldexp(1.0, std::clamp(-exponent, -1022, 1022));
  std::vector<int64_t> sorted(n);
  tridiagonalise(matrix, n, scale, diagonal, off_diagonal, factors, rows);
  solve_tridiagonal(diagonal, off_diagonal, n, rows, sorted.data(), scratch);
  back_transform(matrix, factors, n, rows, stride, scratch);
  for (int64_t i = 0; i < n; ++i) eigenvalues[i] = diagonal[sorted[n - 1 - i]] / scale;
  at::parallel_for(
      0, at::divup(n, kLaneCount), at::divup(4096, n), [&](int64_t begin, int64_t end) {
        for (int64_t j = begin * kLaneCount; j < std::min(n, end * kLaneCount); j += kLaneCount) {
          const double* columns[kLaneCount];
          const int64_t count = std::min(kLaneCount, n - j);
          for (int64_t k = 0; k < count; ++k) columns[k] = rows + sorted[n - 1 - j - k] * stride;
          write_columns(columns, count, n, matrix + j);
        }
      });
}

}  // namespace himo::cpu
