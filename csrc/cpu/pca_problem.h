// Types and helpers shared by the passes over one problem.
#pragma once

#include <ATen/ATen.h>

#include <cmath>
#include <cstdint>
#include <vector>

#include "cpu/centring.h"
#include "cpu/dense.h"

namespace himo::cpu {

inline bool feature_side(const at::Tensor& x) { return x.size(-1) <= x.size(-2); }  // D <= N

// FLOPs of one problem, used to divide a batch among threads.
inline double problem_flops(const at::Tensor& x) {
  const auto n = static_cast<double>(std::min(x.size(-1), x.size(-2)));
  return 10 * n * n * n + 10 * n * static_cast<double>(x.size(-1) * x.size(-2));
}

// The decomposition of one problem.
struct Spectrum {
  const double* eigenvalues;   // [n], descending
  const double* eigenvectors;  // V [n, n]
  int64_t n, rank;

  Spectrum(const at::Tensor& values, const at::Tensor& vectors, const at::Tensor& ranks, int64_t b)
      : eigenvalues(values.const_data_ptr<double>() + b * values.size(1)),
        eigenvectors(vectors.const_data_ptr<double>() + b * vectors.size(1) * vectors.size(1)),
        n(values.size(1)),
        rank(std::clamp(ranks.const_data_ptr<int64_t>()[b], int64_t{1}, values.size(1))) {}

  bool is_nan() const { return std::isnan(eigenvalues[0]); }
  bool keeps_all() const { return rank == n; }
  double trace() const {
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += eigenvalues[i];
    return sum;
  }
  // Whether a kept direction has variance: at tau = 1 the last ones are rounding noise.
  bool is_nonzero(int64_t i) const {
    return eigenvalues[i] > eigenvalues[0] * static_cast<double>(n) * 0x1p-52;
  }
  // lambda_R. Pair weights use eigenvalues divided by it, since squares of eigenvalues overflow.
  double gap_scale() const { return eigenvalues[rank - 1] > 0 ? eigenvalues[rank - 1] : 1.0; }
};

// Returns lambda_R F_ij (README, after (7)) for a gap delta / lambda_R. 0 at a gap of 0, the limit
// for every gap_eps > 0. A nonzero gap is at least 2^-53, so its square does not underflow.
inline double regularised_inverse(double gap, double gap_eps) {
  return gap == 0 ? 0.0 : gap / (gap * gap + gap_eps * gap_eps);
}

// In float32 the rounding error of X along a direction is about eps sqrt(trace / n), and the
// gradient divides it by sqrt(lambda_R): lambda_R >= trace / (16 n) limits the error to 4 eps.
// lambda_R is at least (1 - tau) trace / n, so tau <= 0.93 always passes.
constexpr double kSpread = 16;

inline bool fits_float32(const Spectrum& spectrum) {
  const double last = spectrum.eigenvalues[spectrum.rank - 1];
  return last * static_cast<double>(spectrum.n) * kSpread >= spectrum.trace();
}

// Number of directions on each side of the cut whose pairs are summed in float64. With a narrow gap
// one or two pairs dominate the gradient, and their values may by chance be small relative to
// their rounding. Farther from the cut, at least 8 pairs have similar weights, and it is unlikely
// that all of their values are small.
constexpr int64_t kNear = 4;

// Converts to the dtype of the products. T is float or double, also below.
template <typename T>
void convert(const double* in, int64_t size, T* out);

// products[i][j] *= scale^2 F, README (5), with rows over O and columns over S.
template <typename T>
void weigh_pairs(const double* eigenvalues, int64_t rank, double lambda_r, double gap_eps,
                 double scale, bool dropped, Matrix<T> products);  // [n - k, k]

// Returns the number of kept directions that have a component. On the sample side a direction
// without variance has none: X^T v / sqrt(lambda) is 0 / 0. Eigenvalues descend, so the directions
// with a component come first.
int64_t present_components(const Spectrum& spectrum, bool features);

// Writes the first `count` eigenvectors of X^T X as rows: the present rows of P.
void write_components(const at::Tensor& x, int64_t b, const double* mean, const Spectrum& spectrum,
                      int64_t count,
                      double* out);  // [count, D]

// A power of two that makes the entries of X / scale about 1, so that float32 products neither
// overflow nor underflow for rows of any length. Scaling by it is exact.
inline double entry_scale(const at::Tensor& x, const Spectrum& spectrum) {
  const double mean_square = spectrum.trace() / static_cast<double>(x.size(-1) * x.size(-2));
  return mean_square > 0 ? std::exp2(std::round(0.5 * std::log2(mean_square))) : 1.0;
}

// Scratch memory that one thread reuses from problem to problem.
template <typename T>
class Buffer {
 public:
  // Returns uninitialised memory and invalidates the pointer of the previous call.
  T* get(int64_t elements) {
    if (!memory_.defined() || memory_.numel() < elements) {
      memory_ = at::empty({elements}, at::TensorOptions(c10::CppTypeToScalarType<T>::value));
    }
    return memory_.template mutable_data_ptr<T>();
  }

 private:
  at::Tensor memory_;
};

// A view of a problem's x, gradient or output as [m, n] with m = max(N, D), n = min(N, D). Passes
// run over blocks of the m lines.
struct Sides {
  bool features;  // the features are the small side: [m, n] is [N, D], otherwise its transpose
  int64_t m, n;

  Sides(const at::Tensor& x, bool small_side_is_features)
      : features(small_side_is_features),
        m(x.size(features ? -2 : -1)),
        n(x.size(features ? -1 : -2)) {}

  int64_t step() const { return block_lines(m, n); }
  Block block(int64_t b, int64_t line, int64_t lines) const {
    return features ? Block{b, 1, line, lines, 0, n} : Block{b, 1, 0, n, line, lines};
  }
};

// Returns the given lines of (x - mean) / scale as [lines, n].
template <typename T>
Matrix<T> centred_lines(const at::Tensor& x, const double* mean, const Sides& sides, int64_t b,
                        int64_t line, int64_t lines, double scale, Buffer<T>& buffer) {
  const auto block = sides.block(b, line, lines);
  T* data = buffer.get(lines * sides.n);
  const bool by_rows = centre(x, mean, block, 1 / scale, data);
  const auto natural = by_rows ? row_major(data, block.rows, block.columns)
                               : row_major(data, block.columns, block.rows).t();
  return sides.features ? natural : natural.t();
}

// Shifts every column so that its mean over the rows is the given one.
template <typename T>
void set_column_means(Matrix<T> matrix,  // rows of column_stride 1
                      const std::vector<double>& means) {
  std::vector<double> shifts(matrix.columns, 0.0);
  for (int64_t i = 0; i < matrix.rows; ++i) {
    const T* row = matrix.data + i * matrix.row_stride;
    for (int64_t j = 0; j < matrix.columns; ++j) shifts[j] += row[j];
  }
  for (int64_t j = 0; j < matrix.columns; ++j) {
    shifts[j] = means[j] - shifts[j] / static_cast<double>(matrix.rows);
  }
  for (int64_t i = 0; i < matrix.rows; ++i) {
    T* row = matrix.data + i * matrix.row_stride;
    for (int64_t j = 0; j < matrix.columns; ++j) row[j] = static_cast<T>(row[j] + shifts[j]);
  }
}

}  // namespace himo::cpu
