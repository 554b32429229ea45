// Projection onto the kept directions and its gradients. Products are made in float32 for float32
// and lower input, from float64 eigenvectors: their rounding is not divided by a gap beside what
// the exact gradient is. A problem whose kept eigenvalues span too much for that is taken in
// float64.
//
// Of the kept and the dropped directions, the fewer are multiplied by: S [n, k], k <= n / 2, and O
// the others. X Pi = X S S^T when S is kept, X - X S S^T when it is dropped.

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>

#include <limits>
#include <vector>

#include "cpu/pca_kernel.h"
#include "cpu/pca_problem.h"
#include "cpu/problems.h"

namespace himo::cpu {
namespace {

// In float32, a direction of X is rounded to about eps sqrt(trace / n) and the gradient divides by
// sqrt(lambda_R): lambda_R >= trace / (64 n) keeps that to 8 eps. (1 - tau) / n of the trace is a
// lower bound of lambda_R, so that tau <= 0.98 always passes.
constexpr double kSpread = 64;

bool fits_float32(const Spectrum& spectrum) {
  const double last = spectrum.eigenvalues[spectrum.rank - 1];
  return last * static_cast<double>(spectrum.n) * kSpread >= spectrum.trace();
}

void fill_nan(const at::Tensor& tensor) { tensor.fill_(std::numeric_limits<double>::quiet_NaN()); }

template <typename T>
HIMO_WIDE void convert(const double* in, int64_t size, T* out) {
  for (int64_t i = 0; i < size; ++i) out[i] = static_cast<T>(in[i]);
}

// The smaller side S of the eigenvectors and the other, O, in T.
template <typename T>
struct Basis {
  bool dropped;  // S is the dropped side
  Matrix<const T> smaller, other;
  at::Tensor memory;

  explicit Basis(const Spectrum& spectrum) : dropped(2 * spectrum.rank > spectrum.n) {
    const int64_t n = spectrum.n;
    const T* data;
    if constexpr (std::is_same_v<T, double>) {
      data = spectrum.eigenvectors;
    } else {
      memory = Buffer<T>(n * n).tensor;
      convert(spectrum.eigenvectors, n * n, memory.mutable_data_ptr<T>());
      data = memory.const_data_ptr<T>();
    }
    const auto all = row_major(data, n, n);
    const auto kept = all.column_block(0, spectrum.rank);
    const auto rest = all.column_block(spectrum.rank, n - spectrum.rank);
    smaller = dropped ? rest : kept;
    other = dropped ? kept : rest;
  }
};

// Where lines of an output are summed up in T: in the output itself when that is its dtype.
template <typename T>
class Sums {
 public:
  Sums(const at::Tensor& out, int64_t lines, int64_t n)
      : out_(out),
        scratch_(out.scalar_type() == c10::CppTypeToScalarType<T>::value
                     ? at::Tensor()
                     : Buffer<T>(lines * n).tensor) {}

  // Returns the lines, [N, D] natural, set to `start`, which is broadcast.
  at::Tensor begin(const Sides& sides, int64_t line, int64_t lines, const at::Tensor& start) {
    target_ = sides.slice(out_, line, lines);
    sums_ =
        scratch_.defined() ? scratch_.narrow(0, 0, target_.numel()).view(target_.sizes()) : target_;
    sums_.copy_(start.expand(target_.sizes()));
    return sums_;
  }

  void end() {
    if (scratch_.defined()) target_.copy_(sums_);
  }

 private:
  at::Tensor out_, scratch_, target_, sums_;
};

// The mean as [1, D], or its columns of a block.
at::Tensor mean_row(const double* mean, const Sides& sides, int64_t line, int64_t lines) {
  const int64_t first = sides.features ? 0 : line, count = sides.features ? sides.n : lines;
  return at::from_blob(const_cast<double*>(mean) + first, {1, count},
                       at::TensorOptions(at::kDouble));
}

// out = mean + (values - mean) S S^T, or values - (values - mean) S S^T when S is dropped.
template <typename T>
void project(const at::Tensor& values,  // [*, N, D]
             int64_t b,
             const double* mean,          // [D]
             Matrix<const T> directions,  // S [n, k]
             bool dropped, const Sides& sides, double scale,
             const at::Tensor& out) {  // [N, D]
  const auto source = problem(values, b);
  const int64_t k = directions.columns, step = block_lines(sides.m, sides.n);
  const Buffer<T> centred(step * sides.n), coefficients(step * k);
  Sums<T> sums(out, step, sides.n);
  for (int64_t line = 0; line < sides.m; line += step) {
    const int64_t lines = std::min(step, sides.m - line);
    const auto x = centred_lines<T>(values, mean, sides, b, line, lines, scale, centred);
    const auto along = row_major(coefficients.data, lines, k);
    multiply(x, directions, along);
    const auto start =
        dropped ? sides.slice(source, line, lines) : mean_row(mean, sides, line, lines);
    const auto block = sums.begin(sides, line, lines, start);
    multiply(along, directions.t(), small_side_view<T>(block, sides.features),
             static_cast<T>(dropped ? -scale : scale), 1);
    sums.end();
  }
}

// products[i][j] *= F, README (5), with rows over O and columns over S; F in units of 1 / scale^2.
template <typename T>
HIMO_WIDE void weigh_pairs(const double* eigenvalues, int64_t rank, double unit, double gap_eps,
                           double scale, bool dropped, int64_t rows, int64_t columns,
                           T* products) {  // [n - k, k]
  const double* of_rows = eigenvalues + (dropped ? 0 : rank);
  const double* of_columns = eigenvalues + (dropped ? rank : 0);
  const double sign = dropped ? 1 / unit : -1 / unit;
  const double factor = scale / unit * scale;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      const double gap = (of_rows[i] - of_columns[j]) * sign;  // kept less dropped
      const double inverse = regularised_inverse(gap, gap_eps);
      products[i * columns + j] =
          static_cast<T>(static_cast<double>(products[i * columns + j]) * inverse * factor);
    }
  }
}

// README (4) to (7) through thin products, none of them n x n:
//   E = (B + B^T) S = X^T (G S) + G^T (X S)                       [n, k]
//   K = O (F * (O^T E))                                           [n, k]
//   dC = K S^T + S K^T,  dX = +-(G S + X K) S^T + (X S) K^T
// with G centred. The rows of X add up to zero and so do those of dX: the mean of G passes as it
// is.
template <typename T>
void reconstruct_bwd(const at::Tensor& grad, const at::Tensor& x, int64_t b, const double* mean,
                     const Spectrum& spectrum, double gap_eps,
                     const at::Tensor& grad_x) {  // [N, D]
  const Sides sides(x, feature_side(x));
  const auto grad_mean = column_means(grad, b, 1);
  const auto source = problem(grad, b);
  const Basis<T> basis(spectrum);
  const double scale = entry_scale(x, spectrum);
  const int64_t n = sides.n, k = basis.smaller.columns, step = block_lines(sides.m, n);

  const Buffer<T> x_scratch(step * n), grad_scratch(step * n);
  const Buffer<T> coefficients(sides.m * 2 * k);  // G S, then dX's factor of S | X S
  const Buffer<T> factors(n * 2 * k);             // S | K
  const Buffer<T> sums(n * k), products((n - k) * k);
  const auto both = row_major(coefficients.data, sides.m, 2 * k);
  const auto right = row_major(factors.data, n, 2 * k);
  const auto turned = row_major(sums.data, n, k);  // E

  Matrix<T> centred{};
  for (int64_t line = 0; line < sides.m; line += step) {
    const int64_t lines = std::min(step, sides.m - line);
    centred = centred_lines<T>(x, mean, sides, b, line, lines, scale, x_scratch);
    const auto g =
        centred_lines<T>(grad, grad_mean.data(), sides, b, line, lines, 1.0, grad_scratch);
    const auto along = both.row_block(line, lines);
    multiply(g, basis.smaller, along.column_block(0, k));
    multiply(centred, basis.smaller, along.column_block(k, k));
    multiply(centred.t(), along.column_block(0, k), turned, 1, line == 0 ? 0 : 1);
    multiply(g.t(), along.column_block(k, k), turned, 1, 1);
  }
  const auto pairs = row_major(products.data, n - k, k);
  multiply(basis.other.t(), turned, pairs);
  weigh_pairs(spectrum.eigenvalues, spectrum.rank, spectrum.unit(), gap_eps, scale, basis.dropped,
              pairs.rows, k, pairs.data);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < k; ++j) {
      right.data[i * 2 * k + j] = basis.smaller.data[i * basis.smaller.row_stride + j];
    }
  }
  const auto turn = right.column_block(k, k);  // K
  multiply(basis.other, pairs, turn);

  Sums<T> result(grad_x, step, n);
  for (int64_t line = 0; line < sides.m; line += step) {
    const int64_t lines = std::min(step, sides.m - line);
    if (step < sides.m) {
      centred = centred_lines<T>(x, mean, sides, b, line, lines, scale, x_scratch);
    }
    const auto along = both.row_block(line, lines);
    multiply(centred, turn, along.column_block(0, k), 1, basis.dropped ? -1 : 1);
    const auto start = basis.dropped ? sides.slice(source, line, lines)
                                     : mean_row(grad_mean.data(), sides, line, lines);
    const auto block = result.begin(sides, line, lines, start);
    multiply(along, right.t(), small_side_view<T>(block, sides.features), 1, 1);
    result.end();
  }
}

// G Pi alone. Pi is that of the features: on the sample side it needs the components.
void constant_basis_bwd(const at::Tensor& grad, const at::Tensor& x, int64_t b,
                        const at::Tensor& mean, const at::Tensor& eigenvalues,
                        const at::Tensor& eigenvectors, const at::Tensor& rank,
                        const Spectrum& spectrum, const at::Tensor& grad_x) {
  const auto grad_mean = column_means(grad, b, 1);
  if (feature_side(x)) {
    const Basis<double> basis(spectrum);
    return project<double>(grad, b, grad_mean.data(), basis.smaller, basis.dropped, Sides(x, true),
                           1.0, grad_x);
  }
  const auto rows = at::empty({1, spectrum.n, x.size(-1)}, mean.options());
  components(problem(x, b), mean.narrow(0, b, 1), eigenvalues.narrow(0, b, 1),
             eigenvectors.narrow(0, b, 1), rank.narrow(0, b, 1), rows);
  const auto kept = row_major(rows.const_data_ptr<double>(), spectrum.rank, x.size(-1));
  project<double>(grad, b, grad_mean.data(), kept.t(), false, Sides(x, true), 1.0, grad_x);
}

// vector -= P^T P vector
template <typename T>
void leave_along(Matrix<const T> rows, std::vector<double>& vector) {  // P [R, D], [D]
  std::vector<double> coefficients(rows.rows, 0.0);
  for (int64_t i = 0; i < rows.rows; ++i) {
    const T* row = rows.data + i * rows.columns;
    for (int64_t j = 0; j < rows.columns; ++j) coefficients[i] += row[j] * vector[j];
  }
  for (int64_t i = 0; i < rows.rows; ++i) {
    const T* row = rows.data + i * rows.columns;
    for (int64_t j = 0; j < rows.columns; ++j) vector[j] -= coefficients[i] * row[j];
  }
}

}  // namespace

void pca_reconstruct_fwd(const at::Tensor& x, const at::Tensor& mean, const at::Tensor& eigenvalues,
                         const at::Tensor& eigenvectors, const at::Tensor& rank,
                         const at::Tensor& reconstruction) {
  const double* means = mean.const_data_ptr<double>();
  for_each_problem(mean.size(0), problem_flops(x), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const Spectrum spectrum(eigenvalues, eigenvectors, rank, b);
      const auto out = reconstruction.select(0, b);
      const auto run = [&](auto zero) {
        using T = decltype(zero);
        const Basis<T> basis(spectrum);
        project<T>(x, b, means + b * mean.size(1), basis.smaller, basis.dropped,
                   Sides(x, feature_side(x)), entry_scale(x, spectrum), out);  // HiMo-CLIP eq. (1)
      };
      if (spectrum.is_nan()) {
        fill_nan(out);
      } else if (spectrum.keeps_all()) {
        out.copy_(problem(x, b));
      } else if (x.scalar_type() == at::kDouble) {
        run(double{});
      } else {
        run(float{});
      }
    }
  });
}

void pca_reconstruct_bwd(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& mean,
                         const at::Tensor& eigenvalues, const at::Tensor& eigenvectors,
                         const at::Tensor& rank, double gap_eps, bool differentiate_basis,
                         const at::Tensor& grad_x) {
  for_each_problem(mean.size(0), problem_flops(x), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const Spectrum spectrum(eigenvalues, eigenvectors, rank, b);
      const double* mean_b = mean.const_data_ptr<double>() + b * mean.size(1);
      const auto out = grad_x.select(0, b);
      if (spectrum.is_nan()) {
        fill_nan(out);
      } else if (spectrum.keeps_all()) {
        out.copy_(problem(grad, b));
      } else if (!differentiate_basis) {
        constant_basis_bwd(grad, x, b, mean, eigenvalues, eigenvectors, rank, spectrum, out);
      } else if (x.scalar_type() == at::kDouble || !fits_float32(spectrum)) {
        reconstruct_bwd<double>(grad, x, b, mean_b, spectrum, gap_eps, out);
      } else {
        reconstruct_bwd<float>(grad, x, b, mean_b, spectrum, gap_eps, out);
      }
    }
  });
}

void project_reconstruct_fwd(const at::Tensor& x, const at::Tensor& mean,
                             const at::Tensor& components, const at::Tensor& rank,
                             const at::Tensor& reconstruction) {
  const auto means = mean.to(at::kDouble);  // [B, D]
  const int64_t stored = components.size(1), features = components.size(2);
  AT_DISPATCH_FLOATING_TYPES(mean.scalar_type(), "project_reconstruct", [&] {
    for_each_problem(mean.size(0), problem_flops(x), [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const double* mean_b = means.const_data_ptr<double>() + b * features;
        const int64_t kept = std::clamp(rank.const_data_ptr<int64_t>()[b], int64_t{0}, stored);
        const auto out = reconstruction.select(0, b);
        const Sides sides(x, true);
        if (kept == 0 || x.size(-2) == 0) {
          out.copy_(mean_row(mean_b, sides, 0, x.size(-2)).expand(out.sizes()));
          continue;
        }
        const auto rows = row_major(components.const_data_ptr<scalar_t>() + b * stored * features,
                                    kept, features);
        project<scalar_t>(x, b, mean_b, rows.t(), false, sides, 1.0, out);
      }
    });
  });
}

void project_reconstruct_bwd(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& mean,
                             const at::Tensor& components, const at::Tensor& rank,
                             const at::Tensor& grad_x, const at::Tensor& grad_mean,
                             const at::Tensor& grad_components) {
  const auto means = mean.to(at::kDouble);  // [B, D]
  const int64_t samples = x.size(-2), stored = components.size(1), features = components.size(2);
  AT_DISPATCH_FLOATING_TYPES(mean.scalar_type(), "project_reconstruct", [&] {
    for_each_problem(mean.size(0), problem_flops(x), [&](int64_t begin, int64_t end) {
      const std::vector<double> zeros(features, 0.0);
      const Sides sides(x, true);
      const int64_t step = block_lines(samples, features);
      const Buffer<scalar_t> x_scratch(step * features);
      const Buffer<scalar_t> grad_scratch(step * features);
      const Buffer<scalar_t> coefficients(2 * step * stored);
      for (int64_t b = begin; b < end; ++b) {
        const double* mean_b = means.const_data_ptr<double>() + b * features;
        const int64_t kept = std::clamp(rank.const_data_ptr<int64_t>()[b], int64_t{0}, stored);
        const auto out_x = grad_x.select(0, b), out_rows = grad_components.select(0, b);
        scalar_t* out_mean = grad_mean.mutable_data_ptr<scalar_t>() + b * features;
        out_rows.zero_();
        auto through_mean = column_means(grad, b, 1);
        for (double& value : through_mean) value *= static_cast<double>(samples);
        if (kept == 0 || samples == 0) {
          out_x.zero_();
        } else {
          const auto rows = row_major(components.const_data_ptr<scalar_t>() + b * stored * features,
                                      kept, features);
          const auto grad_rows = row_major(out_rows.mutable_data_ptr<scalar_t>(), kept, features);
          Sums<scalar_t> sums(out_x, step, features);
          for (int64_t line = 0; line < samples; line += step) {
            const int64_t lines = std::min(step, samples - line);
            const auto centred =
                centred_lines<scalar_t>(x, mean_b, sides, b, line, lines, 1.0, x_scratch);
            const auto g = centred_lines<scalar_t>(grad, zeros.data(), sides, b, line, lines, 1.0,
                                                   grad_scratch);
            scalar_t* memory = coefficients.data;
            const auto along = row_major(memory, lines, kept);
            const auto grad_along = row_major(memory + step * stored, lines, kept);
            multiply(centred, rows.t(), along);
            multiply(g, rows.t(), grad_along);
            multiply(along.t(), g, grad_rows, 1, 1);
            multiply(grad_along.t(), centred, grad_rows, 1, 1);
            const auto block = sums.begin(sides, line, lines, at::zeros({1, 1}));
            multiply(grad_along, rows, small_side_view<scalar_t>(block, true), 1, 1);
            sums.end();
          }
          leave_along<scalar_t>(rows, through_mean);
        }
        convert(through_mean.data(), features, out_mean);
      }
    });
  });
}

}  // namespace himo::cpu
