#include <ATen/ATen.h>
#include <ATen/Dispatch.h>

#include <algorithm>

#include "cpu/component_factors.h"
#include "cpu/tensor_matrix.h"

namespace himo::cpu {
namespace {

// If the gap at the cut, relative to lambda_R, is below this, a few pairs next to the cut make up
// most of the gradient, and they are summed in float64.
constexpr double kNarrow = 1e-2;

// out = grad / nu + weight (squares c + overlaps); README (7)
template <typename T>
HIMO_WIDE void coefficient_gradient(const T* grad, double reciprocal, double weight, const T* c,
                                    const double* squares, const double* overlaps, int64_t rank,
                                    T* out) {
  for (int64_t k = 0; k < rank; ++k) {
    out[k] = static_cast<T>(grad[k] * reciprocal + weight * (c[k] * squares[k] + overlaps[k]));
  }
}

// K = O (F * (O^T E)) [n, R], O the dropped directions; README (9). Overwrites E. If the gap at the
// cut is narrow, exact(O', first) gives the entries of O'^T E from column `first` on in float64,
// for the directions O' next to the cut.
template <typename T, typename Exact>
at::Tensor weighted_pairs(const Spectrum& spectrum, const at::Tensor& sum,  // E [n, R]
                          double gap_eps, const Exact& exact) {
  const int64_t rank = spectrum.rank, dropped = spectrum.n - rank;
  const auto outside = directions<T>(spectrum, rank, dropped);
  const auto pairs = at::empty({dropped, rank}, sum.options());
  multiply(outside.t(), sum, pairs, 1, 0);
  const double gap = spectrum.eigenvalues[rank - 1] - spectrum.eigenvalues[rank];
  if (sum.scalar_type() != at::kDouble && gap < kNarrow * spectrum.gap_scale()) {
    const int64_t last = std::min(kNear, dropped), first = std::max<int64_t>(0, rank - kNear);
    const auto near = directions<double>(spectrum, rank, last);
    pairs.narrow(0, 0, last).narrow(1, first, rank - first).copy_(exact(near, first));
  }
  weigh_pairs(spectrum.eigenvalues, rank, spectrum.gap_scale(), gap_eps, 1.0, /*dropped=*/false,
              writable<T>(pairs));
  multiply(outside, pairs, sum, 1, 0);
  return sum;
}

// The columns of a matrix from `first` on, in float64.
at::Tensor last_columns(const at::Tensor& matrix, int64_t first) {
  return matrix.narrow(1, first, matrix.size(1) - first).to(at::kDouble);
}

// K with E of README (8).
template <typename T>
at::Tensor basis_gradient(const Texts& texts, const at::Tensor& x,
                          const at::Tensor& of_coefficients,  // dC [N, R], centred
                          const at::Tensor& of_rows,          // dP [R, D]
                          double gap_eps) {
  const auto& spectrum = texts.spectrum;
  const bool features = feature_side(texts.features);
  const auto long_side = features ? x.t() : x;  // [n, max(N, D)]
  const auto of_long = features ? of_coefficients : of_rows.t();
  const auto of_small = features ? of_rows.t() : of_coefficients;
  const auto sum = at::empty({spectrum.n, spectrum.rank}, x.options());
  sum.copy_(of_small);
  multiply(long_side, of_long, sum, 1, 1);
  return weighted_pairs<T>(spectrum, sum, gap_eps, [&](const at::Tensor& near, int64_t first) {
    const auto across = long_side.to(at::kDouble).t().mm(near);
    return across.t().mm(last_columns(of_long, first)) + near.t().mm(last_columns(of_small, first));
  });
}

// N < D: the part of (6) along B = W^T X is a product with X, like K^T X. K += W (W^T diag(w) W).
template <typename T>
void add_weighted(const at::Tensor& own,  // W [N, R]
                  const std::vector<double>& weights, const at::Tensor& basis_grad) {
  if (weights.empty()) return;
  const int64_t rank = own.size(1);
  const auto weighted = own.contiguous(), square = at::empty({rank, rank}, own.options());
  T* data = weighted.mutable_data_ptr<T>();
  for (int64_t i = 0; i < own.size(0); ++i) {
    scale_row(data + i * rank, weights[i], rank, data + i * rank);
  }
  multiply(own.t(), weighted, square, 1, 0);
  multiply(own, square, basis_grad, 1, 1);
}

// out += (8) to (10). Changes of_coefficients and of_rows.
template <typename T>
void add_through_basis(const Texts& texts, const Factors& factors,
                       const at::Tensor& of_coefficients, const at::Tensor& of_rows,
                       const std::vector<double>& weights, double gap_eps, const at::Tensor& out) {
  const int64_t rank = texts.spectrum.rank;
  const auto own = factors.coefficients.narrow(1, 0, rank), rows = factors.basis.narrow(0, 0, rank);
  const auto& x = factors.centred;
  const auto basis_grad = basis_gradient<T>(texts, x, of_coefficients, of_rows, gap_eps);
  if (feature_side(texts.features)) {
    multiply(x, basis_grad, of_coefficients, 1, 1);
    multiply(of_coefficients, rows, out, 1, 1);
    multiply(own, basis_grad.t(), out, 1, 1);
    return;
  }
  multiply(basis_grad, rows, out, 1, 1);
  add_weighted<T>(own, weights, basis_grad);
  multiply(basis_grad.t(), x, of_rows, 1, 1);
  multiply(own, of_rows, out, 1, 1);
}

// N < D: divides the columns by lambda, or multiplies them by 0 where a direction has no variance.
void divide_by_squares(const Spectrum& spectrum, const at::Tensor& of_coefficients) {  // [N, R]
  const auto inverse = at::zeros({spectrum.rank}, at::kDouble);
  for (int64_t k = 0; k < spectrum.rank && spectrum.is_nonzero(k); ++k) {
    inverse.mutable_data_ptr<double>()[k] = 1 / spectrum.eigenvalues[k];
  }
  of_coefficients.mul_(inverse.to(of_coefficients.dtype()));
}

// out += G Pi without the mean. On the sample side the rows of B are the components times
// sqrt(lambda).
template <typename T>
void add_with_constant_basis(const Texts& texts, const Factors& factors,
                             const at::Tensor& of_coefficients, const at::Tensor& out) {
  const auto& spectrum = texts.spectrum;
  if (!feature_side(texts.features)) divide_by_squares(spectrum, of_coefficients);
  multiply(of_coefficients, factors.basis.narrow(0, 0, spectrum.rank), out, 1, 1);
}

// Writes dC of README (7) without its last column, centred over the samples. Returns w [N] of (6),
// empty if the components are not normalised.
template <typename T>
std::vector<double> write_coefficient_gradient(const at::Tensor& of_keys,  // dK [N, R + 1]
                                               const Factors& factors, bool normalize,
                                               const at::Tensor& of_coefficients) {  // [N, R]
  const int64_t samples = of_coefficients.size(0), rank = of_coefficients.size(1);
  std::vector<double> weights;
  if (normalize) {
    const T* keys_grad = of_keys.const_data_ptr<T>();
    const T* keys = factors.keys.const_data_ptr<T>();
    const T* coefficients = factors.coefficients.const_data_ptr<T>();
    T* coefficients_grad = of_coefficients.mutable_data_ptr<T>();
    weights.resize(samples);
    for_rows(samples, rank, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = i * (rank + 1);
        const double reciprocal = factors.length[i] == 0 ? 0.0 : 1 / factors.length[i];
        weights[i] = -dot(keys_grad + row, keys + row, rank + 1) * reciprocal * reciprocal;
        coefficient_gradient(keys_grad + row, reciprocal, weights[i], coefficients + row,
                             factors.squares.data(), factors.overlaps.data(), rank,
                             coefficients_grad + i * rank);
      }
    });
  } else {
    of_coefficients.copy_(of_keys.narrow(1, 0, rank));
  }
  set_column_means(writable<T>(of_coefficients), std::vector<double>(rank, 0.0));
  return weights;
}

// C^T w [R + 1]
template <typename T>
std::vector<double> shares_of(const std::vector<double>& weights, const Factors& factors) {
  const int64_t stride = factors.coefficients.size(1);
  const T* coefficients = factors.coefficients.const_data_ptr<T>();
  std::vector<double> shares(stride, 0.0);
  for (size_t i = 0; i < weights.size(); ++i) {
    add_multiple(weights[i], coefficients + static_cast<int64_t>(i) * stride, stride,
                 shares.data());
  }
  return shares;
}

template <typename T>
void add_text_gradient(const TextGradient& grad, const at::Tensor& images, const Texts& texts,
                       const ComponentOperands& operands, const at::Tensor& out) {
  const auto& factors = operands.factors;
  const auto options = factors.basis.options();
  const int64_t rank = texts.spectrum.rank, samples = images.size(0), width = images.size(1);
  auto of_keys = grad.of_keys.to(options.dtype());
  const auto of_basis = at::empty({rank + 1, width}, options);
  if (operands.low_rank) {
    const auto of_query = grad.of_query.to(options.dtype());
    multiply(of_query.t(), images.to(options.dtype()), of_basis, 1, 0);  // (6)
  } else {
    const auto of_dense = of_keys;
    of_keys = at::empty({samples, rank + 1}, options);
    multiply(of_dense, factors.basis.t(), of_keys, 1, 0);
    multiply(factors.keys.t(), of_dense, of_basis, 1, 0);
  }
  of_keys = of_keys.contiguous();
  const auto of_coefficients = at::empty({samples, rank}, options);
  const T* basis = factors.basis.const_data_ptr<T>();
  T* basis_grad = of_basis.mutable_data_ptr<T>();
  const auto weights =
      write_coefficient_gradient<T>(of_keys, factors, grad.normalize, of_coefficients);
  if (grad.normalize) {
    // Adds M B with M = C^T diag(w) C, except M[:R, :R]: O^T removes that part, and (10) adds it
    // where it is needed.
    const auto shares = shares_of<T>(weights, factors);
    std::vector<double> of_mean(basis_grad + rank * width, basis_grad + (rank + 1) * width);
    add_multiple(shares[rank], basis + rank * width, width, of_mean.data());
    for (int64_t k = 0; k < rank; ++k) {
      add_multiple(shares[k], basis + k * width, width, of_mean.data());
      add_multiple(shares[k], basis + rank * width, width, basis_grad + k * width);
    }
    convert(of_mean.data(), width, basis_grad + rank * width);
  }
  const auto rows = of_basis.narrow(0, 0, rank);
  if (grad.differentiate_basis) {
    add_through_basis<T>(texts, factors, of_coefficients, rows, weights, grad.gap_eps, out);
  } else {
    add_with_constant_basis<T>(texts, factors, of_coefficients, out);
  }
  T* sums = out.mutable_data_ptr<T>();
  const double share = 1 / static_cast<double>(samples);
  for_rows(samples, width, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      add_multiple(share, basis_grad + rank * width, width, sums + i * width);
    }
  });
}

template <typename T>
void add_from_products(const TextGradient& grad, const at::Tensor& images,
                       const at::Tensor& products, const Texts& texts,
                       const ComponentOperands& operands, const at::Tensor& out) {
  const auto& factors = operands.factors;
  const auto& x = factors.centred;
  const int64_t rank = texts.spectrum.rank, samples = x.size(0), width = x.size(1);
  const auto own = factors.coefficients.narrow(1, 0, rank);
  const auto of_query = grad.of_query.narrow(1, 0, rank);
  const auto of_coefficients = at::empty({samples, rank}, x.options());
  const auto weights = write_coefficient_gradient<T>(grad.of_keys.contiguous(), factors,
                                                     grad.normalize, of_coefficients);
  const auto shares = shares_of<T>(weights, factors);
  const auto square = at::empty({samples, samples}, x.options());
  if (!grad.differentiate_basis) {  // G Pi = dC diag(1 / l) W^T X
    divide_by_squares(texts.spectrum, of_coefficients);
    multiply(of_coefficients, own.t(), square, 1, 0);
  } else {
    const auto sum = of_coefficients.clone();  // (15)
    multiply(products.t(), of_query, sum, 1, 1);
    T* entries = sum.mutable_data_ptr<T>();
    for (int64_t i = 0; i < samples; ++i) {
      add_multiple(factors.along_mean[i], shares.data(), rank, entries + i * rank);
    }
    set_column_means(writable<T>(sum), std::vector<double>(rank, 0.0));
    const auto basis_grad = weighted_pairs<T>(
        texts.spectrum, sum, grad.gap_eps, [&](const at::Tensor& near, int64_t first) {
          const auto across = images.to(at::kDouble).mm(x.to(at::kDouble).t().mm(near));
          const auto along = at::tensor(factors.along_mean, at::kDouble).unsqueeze(0).mm(near);
          const auto of_mean = at::tensor(shares, at::kDouble).narrow(0, first, rank - first);
          return across.t().mm(last_columns(of_query, first)) + along.t() * of_mean +
                 near.t().mm(last_columns(of_coefficients, first));
        });
    multiply(basis_grad, own.t(), square, 1, 0);  // (16)
    add_weighted<T>(own, weights, basis_grad);
    multiply(own, basis_grad.t(), square, 1, 1);
  }
  multiply(square, x, out, 1, 1);
  if (weights.empty()) return;
  const T* coefficients = factors.coefficients.const_data_ptr<T>();
  const auto rows = x.contiguous();
  std::vector<double> along(samples, 0.0), of_mean(width, 0.0);
  add_multiple(shares[rank], texts.mean, width, of_mean.data());
  for (int64_t i = 0; i < samples; ++i) {
    for (int64_t k = 0; k < rank; ++k) {
      along[i] += coefficients[i * (rank + 1) + k] * shares[k];
    }
    add_multiple(along[i], rows.const_data_ptr<T>() + i * width, width, of_mean.data());
  }
  T* sums = out.mutable_data_ptr<T>();
  for_rows(samples, width, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (grad.differentiate_basis) add_multiple(along[i], texts.mean, width, sums + i * width);
      add_multiple(1 / static_cast<double>(samples), of_mean.data(), width, sums + i * width);
    }
  });
}

}  // namespace

void add_text_gradient_from_products(const TextGradient& grad, const at::Tensor& images,
                                     const at::Tensor& products, const Texts& texts,
                                     const ComponentOperands& operands,
                                     const at::Tensor& grad_texts) {
  AT_DISPATCH_FLOATING_TYPES(grad_texts.scalar_type(), "add_text_gradient_from_products", [&] {
    add_from_products<scalar_t>(grad, images, products, texts, operands, grad_texts);
  });
}

void add_text_gradient(const TextGradient& grad, const at::Tensor& images, const Texts& texts,
                       const ComponentOperands& operands, const at::Tensor& grad_texts) {
  const auto products = operands.factors.basis.scalar_type();
  const auto out = products == grad_texts.scalar_type()
                       ? grad_texts
                       : at::zeros(grad_texts.sizes(), grad_texts.options().dtype(products));
  AT_DISPATCH_FLOATING_TYPES(products, "add_text_gradient", [&] {
    add_text_gradient<scalar_t>(grad, images, texts, operands, out);
  });
  if (!out.is_same(grad_texts)) grad_texts.add_(out);
}

}  // namespace himo::cpu
