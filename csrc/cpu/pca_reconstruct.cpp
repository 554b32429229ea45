// Projection onto the kept directions and its gradients. For float32 and lower input, products are
// float32 with eigenvectors rounded from float64. Float32 suffices because error and derivative are
// both divided by the eigenvalue gap. Two cases need float64: the few pairs next to the cut, whose
// values may be small by chance (sum_near_pairs), and kept eigenvalues below 1/16 of the mean
// eigenvalue (fits_float32).
//
// S [n, k], k <= n / 2, is the smaller of the kept and the dropped directions; O holds the others.
// X Pi = X S S^T when S is kept, X - X S S^T when S is dropped.

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>

#include <vector>

#include "cpu/pca_kernel.h"
#include "cpu/pca_output.h"
#include "cpu/pca_problem.h"
#include "cpu/problems.h"

namespace himo::cpu {
namespace {

// Scratch buffers of one thread.
template <typename T>
struct Workspace {
  Buffer<T> vectors, x, grad, sums, along, products, factors, symmetrised;
  Buffer<double> exact_x, exact_grad, near;
};

struct Workspaces {
  Workspace<float> narrow;
  Workspace<double> wide;
};

// S and O, converted to T.
template <typename T>
struct Basis {
  bool dropped;                    // S holds the dropped directions
  Matrix<const T> smaller, other;  // S [n, k], O [n, n - k]

  Basis(const Spectrum& spectrum, Buffer<T>& buffer) : dropped(2 * spectrum.rank > spectrum.n) {
    const int64_t n = spectrum.n, rank = spectrum.rank;
    Matrix<const T> all;
    if constexpr (std::is_same_v<T, double>) {
      all = row_major(spectrum.eigenvectors, n, n);
    } else {
      T* data = buffer.get(n * n);
      convert(spectrum.eigenvectors, n * n, data);
      all = row_major(data, n, n);
    }
    const auto kept = all.column_block(0, rank), rest = all.column_block(rank, n - rank);
    smaller = dropped ? rest : kept;
    other = dropped ? kept : rest;
  }
};

// out = mean + (values - mean) S S^T, or values - (values - mean) S S^T when S is dropped.
template <typename T>
void project(const at::Tensor& values,  // [*, N, D]
             int64_t b,
             const double* mean,          // [D]
             Matrix<const T> directions,  // S [n, k]
             bool dropped, const Sides& sides, double scale, Workspace<T>& work,
             const at::Tensor& out) {  // [B, N, D]
  const int64_t k = directions.columns, step = sides.step();
  Output<T> output(out, b, sides, work.sums);
  for (int64_t line = 0; line < sides.m; line += step) {
    const int64_t lines = std::min(step, sides.m - line);
    const auto x = centred_lines(values, mean, sides, b, line, lines, scale, work.x);
    const auto along = row_major(work.along.get(lines * k), lines, k);
    multiply(x, directions, along);
    const auto block =
        dropped ? output.begin_at(values, b, line, lines) : output.begin_at(mean, line, lines);
    multiply(along, directions.t(), block, static_cast<T>(dropped ? -scale : scale), 1);
    output.end();
  }
}

// Recomputes p_i^T (B + B^T) q_j in float64 for the pairs next to the cut.
template <typename T>
void sum_near_pairs(const at::Tensor& grad, const double* grad_mean, const at::Tensor& x, int64_t b,
                    const double* mean, const Spectrum& spectrum, double scale, bool dropped,
                    Workspace<T>& work, Matrix<T> products) {  // [n - k, k]
  const Sides sides(x, feature_side(x));
  const int64_t n = spectrum.n, rank = spectrum.rank, step = sides.step();
  const int64_t kept = std::min(kNear, rank), all = kept + std::min(kNear, n - rank);
  const auto near = row_major(spectrum.eigenvectors, n, n).column_block(rank - kept, all);
  double* memory = work.near.get(all * (2 * step + all));
  const auto pairs = row_major(memory + 2 * step * all, all, all);  // near^T B near
  for (int64_t line = 0; line < sides.m; line += step) {
    const int64_t lines = std::min(step, sides.m - line);
    const auto centred = centred_lines(x, mean, sides, b, line, lines, scale, work.exact_x);
    const auto g = centred_lines(grad, grad_mean, sides, b, line, lines, 1.0, work.exact_grad);
    const auto x_along = row_major(memory, lines, all);
    const auto grad_along = row_major(memory + step * all, lines, all);
    multiply(centred, near, x_along);
    multiply(g, near, grad_along);
    multiply(x_along.t(), grad_along, pairs, 1, line == 0 ? 0 : 1);
  }
  for (int64_t i = 0; i < kept; ++i) {
    for (int64_t j = kept; j < all; ++j) {
      const int64_t row = dropped ? rank - kept + i : j - kept;
      const int64_t column = dropped ? j - kept : rank - kept + i;
      products.data[row * products.row_stride + column] =
          static_cast<T>(pairs.data[i * all + j] + pairs.data[j * all + i]);
    }
  }
}

// README (4) to (7) with thin products only, none of them n x n:
//   E = (B + B^T) S = X^T (G S) + G^T (X S)                       [n, k]
//   K = O (F * (O^T E))                                           [n, k]
//   dC = K S^T + S K^T,  dX = +-(G S + X K) S^T + (X S) K^T
// with G centred. The rows of X sum to zero, and so do the rows of dX, so the mean of G is added
// unchanged. If x holds only some rows of a batch, of_all is B + B^T of the whole batch, and
// grad_mean is the mean of G over the whole batch.
template <typename T>
void reconstruct_bwd(const at::Tensor& grad, const at::Tensor& x, int64_t b, const double* mean,
                     const double* grad_mean, const Sides& sides, const Spectrum& spectrum,
                     double scale, double gap_eps, const double* of_all,  // [n, n], or null
                     Workspace<T>& work,
                     const at::Tensor& grad_x) {  // [B, N, D]
  const Basis<T> basis(spectrum, work.vectors);
  const int64_t n = sides.n, k = basis.smaller.columns, step = sides.step();

  const auto both = row_major(work.along.get(sides.m * 2 * k), sides.m, 2 * k);  // G S | X S
  const auto symmetrised = row_major(work.symmetrised.get(n * k), n, k);         // E
  Matrix<T> centred{};
  for (int64_t line = 0; line < sides.m; line += step) {
    const int64_t lines = std::min(step, sides.m - line);
    centred = centred_lines(x, mean, sides, b, line, lines, scale, work.x);
    const auto g = centred_lines(grad, grad_mean, sides, b, line, lines, 1.0, work.grad);
    const auto along = both.row_block(line, lines);
    multiply(g, basis.smaller, along.column_block(0, k));
    multiply(centred, basis.smaller, along.column_block(k, k));
    if (of_all == nullptr) {
      multiply(centred.t(), along.column_block(0, k), symmetrised, 1, line == 0 ? 0 : 1);
      multiply(g.t(), along.column_block(k, k), symmetrised, 1, 1);
    }
  }
  const auto pairs = row_major(work.products.get((n - k) * k), n - k, k);
  if constexpr (std::is_same_v<T, double>) {
    if (of_all != nullptr) multiply(row_major(of_all, n, n), basis.smaller, symmetrised);
    multiply(basis.other.t(), symmetrised, pairs);
  } else {
    multiply(basis.other.t(), symmetrised, pairs);
    sum_near_pairs(grad, grad_mean, x, b, mean, spectrum, scale, basis.dropped, work, pairs);
  }
  weigh_pairs(spectrum.eigenvalues, spectrum.rank, spectrum.gap_scale(), gap_eps, scale,
              basis.dropped, pairs);
  const auto factors = row_major(work.factors.get(n * 2 * k), n, 2 * k);  // S | K
  for (int64_t i = 0; i < n; ++i) {
    std::copy_n(basis.smaller.data + i * basis.smaller.row_stride, k, factors.data + i * 2 * k);
  }
  const auto basis_grad = factors.column_block(k, k);  // K
  multiply(basis.other, pairs, basis_grad);

  for (int64_t line = 0; line < sides.m; line += step) {
    const int64_t lines = std::min(step, sides.m - line);
    if (step < sides.m) {
      centred = centred_lines(x, mean, sides, b, line, lines, scale, work.x);
    }
    const auto along = both.row_block(line, lines);
    multiply(centred, basis_grad, along.column_block(0, k), 1, basis.dropped ? -1 : 1);
  }
  // The rows of X sum to zero only up to rounding. If kept eigenvalues are small, the weights
  // amplify this error. Centre the factor along the samples, so that the rows of dX sum to zero.
  if (of_all == nullptr && !fits_float32(spectrum)) {
    set_column_means(sides.features ? both : factors, std::vector<double>(2 * k, 0.0));
  }

  Output<T> output(grad_x, b, sides, work.sums);
  for (int64_t line = 0; line < sides.m; line += step) {
    const int64_t lines = std::min(step, sides.m - line);
    const auto block = basis.dropped ? output.begin_at(grad, b, line, lines)
                                     : output.begin_at(grad_mean, line, lines);
    multiply(both.row_block(line, lines), factors.t(), block, 1, 1);
    output.end();
  }
}

// Only G Pi, in float64. Pi acts on the features, so the sample side needs the components.
void constant_basis_bwd(const at::Tensor& grad, const at::Tensor& x, int64_t b, const double* mean,
                        const Spectrum& spectrum, Workspace<double>& work,
                        const at::Tensor& grad_x) {
  const auto grad_mean = column_means(grad, b, 1);
  Matrix<const double> directions{};
  bool dropped = false;
  if (feature_side(x)) {
    const Basis<double> basis(spectrum, work.vectors);
    directions = basis.smaller, dropped = basis.dropped;
  } else {
    const int64_t count = present_components(spectrum, false), features = x.size(-1);
    double* rows = work.vectors.get(count * features);
    write_components(x, b, mean, spectrum, count, rows);
    directions = row_major<const double>(rows, count, features).t();
  }
  project(grad, b, grad_mean.data(), directions, dropped, Sides(x, true), 1.0, work, grad_x);
}

// vector -= P^T P vector
template <typename T>
void leave_along(Matrix<const T> rows, std::vector<double>& vector) {  // P [R, D], [D]
  std::vector<double> coefficients(rows.rows, 0.0);
  for (int64_t i = 0; i < rows.rows; ++i) {
    const T* row = rows.data + i * rows.row_stride;
    for (int64_t j = 0; j < rows.columns; ++j) coefficients[i] += row[j] * vector[j];
  }
  for (int64_t i = 0; i < rows.rows; ++i) {
    const T* row = rows.data + i * rows.row_stride;
    for (int64_t j = 0; j < rows.columns; ++j) vector[j] -= coefficients[i] * row[j];
  }
}

}  // namespace

void pca_reconstruct_fwd(const at::Tensor& x, const at::Tensor& mean, const at::Tensor& eigenvalues,
                         const at::Tensor& eigenvectors, const at::Tensor& rank,
                         const at::Tensor& reconstruction) {
  const Sides sides(x, feature_side(x));
  for_each_problem<Workspaces>(mean.size(0), problem_flops(x), [&](int64_t b, Workspaces& work) {
    const Spectrum spectrum(eigenvalues, eigenvectors, rank, b);
    const double* mean_b = mean.const_data_ptr<double>() + b * mean.size(1);
    const auto run = [&](auto& typed) {
      const Basis basis(spectrum, typed.vectors);
      project(x, b, mean_b, basis.smaller, basis.dropped, sides, entry_scale(x, spectrum), typed,
              reconstruction);  // HiMo-CLIP eq. (1)
    };
    if (spectrum.is_nan()) {
      fill_nan(reconstruction, b);
    } else if (spectrum.keeps_all()) {
      copy_problem(x, reconstruction, b);
    } else if (x.scalar_type() == at::kDouble) {
      run(work.wide);
    } else {
      run(work.narrow);
    }
  });
}

void pca_reconstruct_bwd(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& mean,
                         const at::Tensor& eigenvalues, const at::Tensor& eigenvectors,
                         const at::Tensor& rank, double gap_eps, bool differentiate_basis,
                         const at::Tensor& grad_x) {
  for_each_problem<Workspaces>(mean.size(0), problem_flops(x), [&](int64_t b, Workspaces& work) {
    const Spectrum spectrum(eigenvalues, eigenvectors, rank, b);
    const double* mean_b = mean.const_data_ptr<double>() + b * mean.size(1);
    if (spectrum.is_nan()) return fill_nan(grad_x, b);
    if (spectrum.keeps_all()) return copy_problem(grad, grad_x, b);
    if (!differentiate_basis) {
      return constant_basis_bwd(grad, x, b, mean_b, spectrum, work.wide, grad_x);
    }
    const auto grad_mean = column_means(grad, b, 1);
    const auto run = [&](auto& typed) {
      reconstruct_bwd(grad, x, b, mean_b, grad_mean.data(), Sides(x, feature_side(x)), spectrum,
                      entry_scale(x, spectrum), gap_eps, nullptr, typed, grad_x);
    };
    if (x.scalar_type() == at::kDouble || !fits_float32(spectrum)) {
      run(work.wide);
    } else {
      run(work.narrow);
    }
  });
}

// The next three functions take some rows of a batch. They use the D x D side of the PCA.

void moment_reconstruct(const at::Tensor& x, const at::Tensor& mean, const at::Tensor& eigenvalues,
                        const at::Tensor& eigenvectors, const at::Tensor& rank,
                        const at::Tensor& reconstruction) {
  const Spectrum spectrum(eigenvalues, eigenvectors, rank, 0);
  if (spectrum.is_nan()) return fill_nan(reconstruction, 0);
  if (spectrum.keeps_all()) return copy_problem(x, reconstruction, 0);
  Workspace<double> work;
  const Basis<double> basis(spectrum, work.vectors);
  project(x, 0, mean.const_data_ptr<double>(), basis.smaller, basis.dropped, Sides(x, true), 1.0,
          work, reconstruction);
}

void moment_grad_projector(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& mean,
                           const at::Tensor& out) {
  const Sides sides(x, true);
  const std::vector<double> zeros(sides.n, 0.0);
  const auto sums = row_major(out.mutable_data_ptr<double>(), sides.n, sides.n);
  const int64_t step = sides.step();
  Buffer<double> x_memory, grad_memory;
  for (int64_t line = 0; line < sides.m; line += step) {
    const int64_t lines = std::min(step, sides.m - line);
    const auto centred =
        centred_lines(x, mean.const_data_ptr<double>(), sides, 0, line, lines, 1.0, x_memory);
    const auto g = centred_lines(grad, zeros.data(), sides, 0, line, lines, 1.0, grad_memory);
    multiply(centred.t(), g, sums, 1, line == 0 ? 0 : 1);
  }
}

void moment_bwd(const at::Tensor& grad, const at::Tensor& grad_mean, const at::Tensor& x,
                const at::Tensor& mean, const at::Tensor& grad_projector,
                const at::Tensor& eigenvalues, const at::Tensor& eigenvectors,
                const at::Tensor& rank, double gap_eps, const at::Tensor& grad_x) {
  const Spectrum spectrum(eigenvalues, eigenvectors, rank, 0);
  if (spectrum.is_nan()) return fill_nan(grad_x, 0);
  if (spectrum.keeps_all()) return copy_problem(grad, grad_x, 0);
  const double* grad_means = grad_mean.const_data_ptr<double>();
  const Sides sides(x, true);
  Workspace<double> work;
  if (!grad_projector.defined()) {
    const Basis<double> basis(spectrum, work.vectors);
    return project(grad, 0, grad_means, basis.smaller, basis.dropped, sides, 1.0, work, grad_x);
  }
  reconstruct_bwd(grad, x, 0, mean.const_data_ptr<double>(), grad_means, sides, spectrum, 1.0,
                  gap_eps, grad_projector.const_data_ptr<double>(), work, grad_x);
}

void project_reconstruct_fwd(const at::Tensor& x, const at::Tensor& mean,
                             const at::Tensor& components, const at::Tensor& rank,
                             const at::Tensor& reconstruction) {
  const auto means = mean.to(at::kDouble);  // [B, D]
  const int64_t stored = components.size(1), features = components.size(2);
  const Sides sides(x, true);
  AT_DISPATCH_FLOATING_TYPES(mean.scalar_type(), "project_reconstruct", [&] {
    const auto project_one = [&](int64_t b, Workspace<scalar_t>& work) {
      const double* mean_b = means.const_data_ptr<double>() + b * features;
      const int64_t kept = std::clamp(rank.const_data_ptr<int64_t>()[b], int64_t{0}, stored);
      if (kept == 0) {
        Output<scalar_t> output(reconstruction, b, sides, work.sums);
        output.begin_at(mean_b, 0, sides.m);
        return output.end();
      }
      const scalar_t* rows = components.const_data_ptr<scalar_t>() + b * stored * features;
      project(x, b, mean_b, row_major(rows, kept, features).t(), false, sides, 1.0, work,
              reconstruction);
    };
    for_each_problem<Workspace<scalar_t>>(mean.size(0), problem_flops(x), project_one);
  });
}

void project_reconstruct_bwd(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& mean,
                             const at::Tensor& components, const at::Tensor& rank,
                             const at::Tensor& grad_x, const at::Tensor& grad_mean,
                             const at::Tensor& grad_components) {
  const auto means = mean.to(at::kDouble);  // [B, D]
  const int64_t samples = x.size(-2), stored = components.size(1), features = components.size(2);
  const std::vector<double> zeros(features, 0.0);
  const Sides sides(x, true);
  AT_DISPATCH_FLOATING_TYPES(mean.scalar_type(), "project_reconstruct", [&] {
    const auto project_one = [&](int64_t b, Workspace<scalar_t>& work) {
      const double* mean_b = means.const_data_ptr<double>() + b * features;
      const int64_t kept = std::clamp(rank.const_data_ptr<int64_t>()[b], int64_t{0}, stored);
      const scalar_t* data = components.const_data_ptr<scalar_t>() + b * stored * features;
      const auto rows = row_major(data, kept, features);  // P
      scalar_t* out = grad_components.mutable_data_ptr<scalar_t>() + b * stored * features;
      const auto grad_rows = row_major(out, kept, features);
      std::fill_n(out + kept * features, (stored - kept) * features, scalar_t{0});

      // dL/dmean = (sum of G) (I - P^T P): mean is added to the output and subtracted from x.
      auto through_mean = column_means(grad, b, 1);
      for (double& value : through_mean) value *= static_cast<double>(samples);
      leave_along(rows, through_mean);
      convert(through_mean.data(), features, grad_mean.mutable_data_ptr<scalar_t>() + b * features);

      Output<scalar_t> output(grad_x, b, sides, work.sums);
      const int64_t step = sides.step();
      for (int64_t line = 0; line < samples; line += step) {
        const int64_t lines = std::min(step, samples - line);
        const auto block = output.begin_at(zeros.data(), line, lines);
        if (kept > 0) {
          const auto centred = centred_lines(x, mean_b, sides, b, line, lines, 1.0, work.x);
          const auto g = centred_lines(grad, zeros.data(), sides, b, line, lines, 1.0, work.grad);
          const auto along = row_major(work.along.get(lines * kept), lines, kept);
          const auto grad_along = row_major(work.products.get(lines * kept), lines, kept);
          multiply(centred, rows.t(), along);
          multiply(g, rows.t(), grad_along);
          multiply(along.t(), g, grad_rows, 1, line == 0 ? 0 : 1);
          multiply(grad_along.t(), centred, grad_rows, 1, 1);
          multiply(grad_along, rows, block, 1, 1);
        }
        output.end();
      }
    };
    for_each_problem<Workspace<scalar_t>>(mean.size(0), problem_flops(x), project_one);
  });
}

}  // namespace himo::cpu
