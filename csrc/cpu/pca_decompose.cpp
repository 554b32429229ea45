// The decomposition in float64 (eigenvalues, eigenvectors, rank and components) and the gradient of
// `pca`. The rank is known on the host, so kept and dropped directions are slices, not masks.

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "cpu/pca_kernel.h"
#include "cpu/pca_output.h"
#include "cpu/pca_problem.h"
#include "cpu/problems.h"
#include "cpu/symmetric_eigen.h"

namespace himo::cpu {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// Returns the smallest r whose share of the trace reaches the threshold, README (2), or n if the
// batch has no variance, README (2'). shift is N |mean|^2, the part of sum(x^2) that centring
// removes.
int64_t choose_rank(const double* eigenvalues, int64_t n, double shift, double threshold,
                    const std::pair<double, double>& floor) {
  double trace = 0;  // same order as the cumulative sum: the last share is exactly 1 (tau = 1)
  for (int64_t i = 0; i < n; ++i) trace += eigenvalues[i];
  if (!(trace > floor.first * (trace + shift) + floor.second)) return n;
  double sum = eigenvalues[0];
  int64_t rank = 1;
  while (rank < n && sum / trace < threshold) sum += eigenvalues[rank++];
  return rank;
}

bool is_finite(const double* values, int64_t count) {
  return std::all_of(values, values + count, [](double value) { return std::isfinite(value); });
}

// The weights of README (9): F_i0, which pairs kept i with a direction of variance 0, and
// lambda_R (F_ij - F_i0) / lambda_j, for which both vectors a_j are divided by sqrt(lambda_R).
double null_weight(const Spectrum& spectrum, int64_t i, double gap_eps) {
  return regularised_inverse(spectrum.eigenvalues[i] / spectrum.gap_scale(), gap_eps) /
         spectrum.gap_scale();
}

double null_correction(const Spectrum& spectrum, int64_t i, int64_t j, double gap_eps) {
  const double scale = spectrum.gap_scale(), square = gap_eps * gap_eps;
  const double kept = spectrum.eigenvalues[i] / scale;
  const double gap = (spectrum.eigenvalues[i] - spectrum.eigenvalues[j]) / scale;
  if (gap == 0) return 0;
  return (gap * kept - square) / ((gap * gap + square) * (kept * kept + square)) / scale;
}

// The incoming gradients of one problem.
struct Incoming {
  const double* eigenvalues;        // [n]
  Matrix<const double> components;  // [P, D], of the present components
};

// Returns H = (F * (g Q)) Q^T over the dropped directions Q; README (8).
at::Tensor coupling_of_features(const Spectrum& spectrum, const Incoming& grad, double gap_eps) {
  const int64_t n = spectrum.n, kept = spectrum.rank, dropped = n - kept;
  const auto coupling = at::zeros({kept, n}, at::kDouble);
  if (dropped == 0) return coupling;
  const auto outside = row_major(spectrum.eigenvectors, n, n).column_block(kept, dropped);
  Buffer<double> memory;
  const auto pairs = row_major(memory.get(kept * dropped), kept, dropped);
  multiply(grad.components, outside, pairs);
  for (int64_t i = 0; i < kept; ++i) {
    for (int64_t j = 0; j < dropped; ++j) {
      const double gap =
          (spectrum.eigenvalues[i] - spectrum.eigenvalues[kept + j]) / spectrum.gap_scale();
      pairs.data[i * dropped + j] *= regularised_inverse(gap, gap_eps) / spectrum.gap_scale();
    }
  }
  multiply(pairs, outside.t(), row_major(coupling.mutable_data_ptr<double>(), kept, n));
  return coupling;
}

// dX = X (2 V diag(gl) V^T + H^T P + P^T H), README (10), in blocks of rows.
void features_bwd(const at::Tensor& x, int64_t b, const double* mean, const Spectrum& spectrum,
                  const Incoming& grad, double gap_eps,
                  Matrix<double> out) {  // [N, D]
  const int64_t n = spectrum.n, samples = x.size(-2);
  const auto vectors = row_major(spectrum.eigenvectors, n, n);
  Buffer<double> memory, scratch;
  const auto scaled = row_major(memory.get(2 * n * n), n, n);
  const auto symmetric = row_major(scaled.data + n * n, n, n);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      scaled.data[i * n + j] = 2 * vectors.data[i * n + j] * grad.eigenvalues[j];
    }
  }
  multiply(scaled, vectors.t(), symmetric);
  const auto coupling_memory = coupling_of_features(spectrum, grad, gap_eps);
  const auto coupling = row_major(coupling_memory.mutable_data_ptr<double>(), spectrum.rank, n);
  const auto kept = vectors.column_block(0, spectrum.rank);  // P^T
  multiply(coupling.t(), kept.t(), symmetric, 1, 1);
  multiply(kept, coupling, symmetric, 1, 1);
  const Sides sides(x, true);
  const int64_t step = block_lines(samples, n);
  for (int64_t line = 0; line < samples; line += step) {
    const int64_t lines = std::min(step, samples - line);
    const auto centred = centred_lines(x, mean, sides, b, line, lines, 1.0, scratch);
    multiply(centred, symmetric, out.row_block(line, lines), 1, 1);
  }
}

// dX = 2 V diag(gl) V^T X + (X H^T) P + (X P^T) H with the rows of H from README (9).
void samples_bwd(const at::Tensor& x, int64_t b, const double* mean, const Spectrum& spectrum,
                 const Incoming& grad, double gap_eps,
                 Matrix<double> out) {  // [N, D]
  const int64_t n = spectrum.n, features = x.size(-1), count = grad.components.rows;
  const auto vectors = row_major(spectrum.eigenvectors, n, n);
  Buffer<double> x_memory, axes_memory, memory;
  const auto centred = centred_lines(x, mean, Sides(x, true), b, 0, n, 1.0, x_memory);
  const auto axes = row_major(axes_memory.get(2 * n * features), n, features);  // V^T X
  const auto scaled = row_major(axes.data + n * features, n, features);
  multiply(vectors.t(), centred, axes);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < features; ++j) {
      scaled.data[i * features + j] = 2 * grad.eigenvalues[i] * axes.data[i * features + j];
    }
  }
  multiply(vectors, scaled, out, 1, 1);
  if (count == 0) return;

  const int64_t first = spectrum.rank, dropped = n - first;
  double* data = memory.get(count * (2 * features + n));
  const auto rows = row_major(data, count, features);                              // P
  const auto coupling = row_major(rows.data + count * features, count, features);  // H
  double* products = coupling.data + count * features;
  write_components(x, b, mean, spectrum, count, rows.data);
  const auto overlaps = row_major(products, count, count);
  multiply(grad.components, rows.t(), overlaps);
  for (int64_t i = 0; i < count; ++i) {
    std::copy_n(grad.components.data + i * features, features, coupling.data + i * features);
  }
  multiply(overlaps, rows, coupling, -1, 1);  // g - g P^T P
  for (int64_t i = 0; i < count; ++i) {
    const double weight = null_weight(spectrum, i, gap_eps);
    for (int64_t j = 0; j < features; ++j) coupling.data[i * features + j] *= weight;
  }
  if (dropped > 0) {
    const auto pairs = row_major(products, count, dropped);
    const auto dropped_axes = scaled.row_block(first, dropped);
    const double norm = std::sqrt(spectrum.gap_scale());
    for (int64_t k = 0; k < dropped * features; ++k) {
      dropped_axes.data[k] = axes.data[first * features + k] / norm;
    }
    multiply(grad.components, dropped_axes.t(), pairs);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t j = 0; j < dropped; ++j) {
        pairs.data[i * dropped + j] *= null_correction(spectrum, i, first + j, gap_eps);
      }
    }
    multiply(pairs, dropped_axes, coupling, 1, 1);
  }
  const auto along = row_major(products, n, count);
  multiply(centred, coupling.t(), along);
  multiply(along, rows, out, 1, 1);
  multiply(centred, rows.t(), along);
  multiply(along, coupling, out, 1, 1);
}

}  // namespace

int64_t present_components(const Spectrum& spectrum, bool features) {
  int64_t count = spectrum.rank;
  while (!features && count > 0 && !spectrum.is_nonzero(count - 1)) --count;
  return count;
}

void write_components(const at::Tensor& x, int64_t b, const double* mean, const Spectrum& spectrum,
                      int64_t count,
                      double* out) {  // [count, D]
  const int64_t n = spectrum.n, samples = x.size(-2), features = x.size(-1);
  if (count == 0) return;
  const auto vectors = row_major(spectrum.eigenvectors, n, n).column_block(0, count);
  if (feature_side(x)) {
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t j = 0; j < n; ++j) out[i * n + j] = spectrum.eigenvectors[j * n + i];
    }
    return;
  }
  const Sides sides(x, false);
  const int64_t step = block_lines(features, samples);
  Buffer<double> scratch;
  const auto rows = row_major(out, count, features);
  for (int64_t line = 0; line < features; line += step) {
    const int64_t lines = std::min(step, features - line);
    const auto centred = centred_lines(x, mean, sides, b, line, lines, 1.0, scratch);
    multiply(vectors.t(), centred.t(), rows.column_block(line, lines));
  }
  for (int64_t i = 0; i < count; ++i) {
    const double norm = std::sqrt(spectrum.eigenvalues[i]);
    for (int64_t j = 0; j < features; ++j) out[i * features + j] /= norm;
  }
}

void decompose(const at::Tensor& moments, const at::Tensor& means, int64_t samples,
               double variance_threshold, const std::pair<double, double>& floor,
               const at::Tensor& eigenvalues, const at::Tensor& rank) {
  const int64_t n = moments.size(1), features = means.size(1);
  const double cube = static_cast<double>(n) * static_cast<double>(n * n);
  for_each_problem<Buffer<double>>(
      moments.size(0), 10 * cube, [&](int64_t b, Buffer<double>& work) {
        double* matrix = moments.mutable_data_ptr<double>() + b * n * n;
        double* values = eigenvalues.mutable_data_ptr<double>() + b * n;
        int64_t& chosen = rank.mutable_data_ptr<int64_t>()[b];
        if (!is_finite(matrix, n * n)) {
          std::fill_n(matrix, n * n, kNan);
          std::fill_n(values, n, kNan);
          chosen = n;
          return;
        }
        const auto solver = fastest_eigensolver(n);
        solve_symmetric(matrix, values, n, work.get(solver_work(n, solver)), solver);
        for (int64_t i = 0; i < n; ++i) values[i] = std::max(values[i], 0.0);
        const double* mean = means.const_data_ptr<double>() + b * features;
        const double square = std::inner_product(mean, mean + features, mean, 0.0);
        chosen = choose_rank(values, n, static_cast<double>(samples) * square, variance_threshold,
                             floor);
      });
}

void components(const at::Tensor& x, const at::Tensor& mean, const at::Tensor& eigenvalues,
                const at::Tensor& eigenvectors, const at::Tensor& rank, const at::Tensor& out) {
  const int64_t size = out.size(1) * out.size(2), features = x.size(-1);
  struct Nothing {};
  for_each_problem<Nothing>(mean.size(0), problem_flops(x), [&](int64_t b, Nothing&) {
    const Spectrum spectrum(eigenvalues, eigenvectors, rank, b);
    double* rows = out.mutable_data_ptr<double>() + b * size;
    if (spectrum.is_nan()) {
      std::fill_n(rows, size, kNan);
      return;
    }
    const int64_t count = present_components(spectrum, feature_side(x));
    write_components(x, b, mean.const_data_ptr<double>() + b * features, spectrum, count, rows);
    std::fill(rows + count * features, rows + size, 0.0);
  });
}

void pca_bwd(const at::Tensor& grad_mean, const at::Tensor& grad_eigenvalues,
             const at::Tensor& grad_components, const at::Tensor& x, const at::Tensor& mean,
             const at::Tensor& eigenvalues, const at::Tensor& eigenvectors, const at::Tensor& rank,
             double gap_eps, const at::Tensor& grad_x) {
  const int64_t n = eigenvalues.size(1), samples = x.size(-2), features = x.size(-1);
  const Sides sides(x, true);
  for_each_problem<Buffer<double>>(
      mean.size(0), problem_flops(x), [&](int64_t b, Buffer<double>& sums) {
        const Spectrum spectrum(eigenvalues, eigenvectors, rank, b);
        const double* mean_b = mean.const_data_ptr<double>() + b * features;
        if (spectrum.is_nan()) return fill_nan(grad_x, b);
        const Incoming grad{grad_eigenvalues.const_data_ptr<double>() + b * n,
                            row_major(grad_components.const_data_ptr<double>() + b * n * features,
                                      present_components(spectrum, feature_side(x)), features)};
        Output<double> output(grad_x, b, sides, sums);
        // The rows of X sum to zero, so the rows of dX must too. The large weights of kept noise
        // directions amplify rounding there, so the column means are set explicitly.
        std::vector<double> means(features, 0.0);
        const auto out = output.begin_at(means.data(), 0, samples);
        if (feature_side(x)) {
          features_bwd(x, b, mean_b, spectrum, grad, gap_eps, out);
        } else {
          samples_bwd(x, b, mean_b, spectrum, grad, gap_eps, out);
        }
        const double* of_mean = grad_mean.const_data_ptr<double>() + b * features;
        for (int64_t j = 0; j < features; ++j) means[j] = of_mean[j] / static_cast<double>(samples);
        set_column_means(out, means);
        output.end();
      });
}

}  // namespace himo::cpu
