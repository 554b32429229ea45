#include "cpu/component_factors.h"

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>

#include "cpu/centring.h"
#include "cpu/dense.h"
#include "cpu/tile_products.h"
#include "normalize.h"

namespace himo::cpu {
namespace {

// If the mean square of X is in this range, no float32 product overflows or underflows.
constexpr double kSmallest = 1e-20, kLargest = 1e20;
// If the gap at the cut, relative to lambda_R, is below this, a few pairs next to the cut make up
// most of the gradient, and they are summed in float64.
constexpr double kNarrow = 1e-2;

bool on_feature_side(const Texts& texts) { return feature_side(texts.features); }

at::ScalarType accumulation_dtype(const at::Tensor& features) {
  return features.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

at::ScalarType dtype_of_products(const Texts& texts) {
  if (texts.features.scalar_type() == at::kDouble) return at::kDouble;
  const double mean_square =
      texts.spectrum.trace() / static_cast<double>(texts.features.numel());
  const bool in_range = mean_square >= kSmallest && mean_square <= kLargest;
  return in_range && fits_float32(texts.spectrum) ? at::kFloat : at::kDouble;
}

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

// Calls body(first, last) for ranges of the rows, in parallel.
template <typename Body>
void for_rows(int64_t rows, int64_t columns, const Body& body) {
  at::parallel_for(0, rows, grain(columns), body);
}

// sum_k squares_k (c_k + along_k)^2. Eight sums, so that the loop is vectorised.
template <typename T>
HIMO_WIDE double squared_length(const T* c, const double* along, const double* squares,
                                int64_t rank) {
  double sums[8] = {};
  int64_t k = 0;
  for (; k + 8 <= rank; k += 8) {
    for (int64_t u = 0; u < 8; ++u) {
      const double entry = c[k + u] + along[k + u];
      sums[u] += squares[k + u] * entry * entry;
    }
  }
  for (; k < rank; ++k) sums[0] += squares[k] * (c[k] + along[k]) * (c[k] + along[k]);
  return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
}

template <typename T>
HIMO_WIDE double dot(const T* a, const T* b, int64_t size) {
  double sums[8] = {};
  int64_t k = 0;
  for (; k + 8 <= size; k += 8) {
    for (int64_t u = 0; u < 8; ++u) sums[u] += static_cast<double>(a[k + u]) * b[k + u];
  }
  for (; k < size; ++k) sums[0] += static_cast<double>(a[k]) * b[k];
  return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
}

template <typename T, typename sum_t>
HIMO_WIDE void add_multiple(double factor, const T* x, int64_t size, sum_t* out) {
  for (int64_t k = 0; k < size; ++k) {
    out[k] = static_cast<sum_t>(out[k] + factor * static_cast<double>(x[k]));
  }
}

template <typename T>
HIMO_WIDE void scale_row(const T* row, double factor, int64_t size, T* out) {
  for (int64_t k = 0; k < size; ++k) out[k] = static_cast<T>(row[k] * factor);
}

// out = grad / nu + weight (squares c + overlaps); README (7)
template <typename T>
HIMO_WIDE void coefficient_gradient(const T* grad, double reciprocal, double weight, const T* c,
                                    const double* squares, const double* overlaps, int64_t rank,
                                    T* out) {
  for (int64_t k = 0; k < rank; ++k) {
    out[k] = static_cast<T>(grad[k] * reciprocal + weight * (c[k] * squares[k] + overlaps[k]));
  }
}

// Returns X in the memory order of the features, so that reads and writes are contiguous.
template <typename T>
at::Tensor centred(const Texts& texts) {
  const int64_t samples = texts.features.size(0), width = texts.features.size(1);
  const auto out = at::empty({samples * width}, at::TensorOptions(c10::CppTypeToScalarType<T>::value));
  const Block whole{0, 1, 0, samples, 0, width};
  const bool by_rows = centre(texts.features, texts.mean, whole, 1.0, out.mutable_data_ptr<T>());
  return by_rows ? out.view({samples, width}) : out.view({width, samples}).t();
}

// Returns the columns [from, from + count) of V in the dtype of the products.
template <typename T>
at::Tensor directions(const Spectrum& spectrum, int64_t from, int64_t count) {
  const auto out =
      at::empty({spectrum.n, count}, at::TensorOptions(c10::CppTypeToScalarType<T>::value));
  for (int64_t i = 0; i < spectrum.n; ++i) {
    convert(spectrum.eigenvectors + i * spectrum.n + from, count,
            out.mutable_data_ptr<T>() + i * count);
  }
  return out;
}

// Writes C and B; README (1).
template <typename T>
void write_factors(const Texts& texts, Factors& factors) {
  const auto& spectrum = texts.spectrum;
  const int64_t rank = spectrum.rank, samples = factors.coefficients.size(0);
  const auto own = factors.coefficients.narrow(1, 0, rank), rows = factors.basis.narrow(0, 0, rank);
  const auto kept = directions<T>(spectrum, 0, rank);
  if (on_feature_side(texts)) {
    rows.copy_(kept.t());
    multiply(factors.centred, kept, own, 1, 0);
  } else {
    own.copy_(kept);
    multiply(kept.t(), factors.centred, rows, 1, 0);
  }
  T* last = factors.coefficients.mutable_data_ptr<T>() + rank;
  for (int64_t i = 0; i < samples; ++i) last[i * (rank + 1)] = 1;
  convert(texts.mean, factors.basis.size(1),
          factors.basis.mutable_data_ptr<T>() + rank * factors.basis.size(1));
}

// README (2): u' = (C + m / l) B + (part of the mean orthogonal to B). Orthogonal terms do not
// cancel. Writes l, m, nu and C / nu.
template <typename T>
void write_keys(const Texts& texts, bool normalize, Factors& factors) {
  const auto& spectrum = texts.spectrum;
  const int64_t rank = spectrum.rank, samples = factors.coefficients.size(0);
  const int64_t width = factors.basis.size(1), stride = rank + 1;
  const T* basis = factors.basis.const_data_ptr<T>();
  const T* coefficients = factors.coefficients.const_data_ptr<T>();
  const T* mean = basis + rank * width;
  factors.squares.assign(rank, 1.0);
  if (!on_feature_side(texts)) std::copy_n(spectrum.eigenvalues, rank, factors.squares.begin());
  factors.overlaps.resize(rank);
  std::vector<double> along(rank, 0.0);
  for (int64_t k = 0; k < rank; ++k) {
    factors.overlaps[k] = dot(basis + k * width, mean, width);
    if (on_feature_side(texts) || spectrum.is_nonzero(k)) {
      along[k] = factors.overlaps[k] / factors.squares[k];
    }
  }
  if (!normalize) {
    factors.keys = factors.coefficients;
    return;
  }
  std::vector<double> across(mean, mean + width);
  for (int64_t k = 0; k < rank; ++k) {
    add_multiple(-along[k], basis + k * width, width, across.data());
  }
  const double rest = dot(across.data(), across.data(), width);
  factors.length.resize(samples);
  factors.keys = at::empty_like(factors.coefficients);
  T* keys = factors.keys.mutable_data_ptr<T>();
  for_rows(samples, stride, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T* row = coefficients + i * stride;
      const double length =
          std::sqrt(squared_length(row, along.data(), factors.squares.data(), rank) + rest);
      factors.length[i] = length;
      // A row of zeros has no direction, as in normalize.
      scale_row(row, length == 0 ? 0.0 : 1 / length, stride, keys + i * stride);
    }
  });
}

// K = O (F * (O^T E)) [n, R], O the dropped directions; README (8), (9).
template <typename T>
at::Tensor basis_gradient(const Texts& texts, const at::Tensor& x,
                          const at::Tensor& of_coefficients,  // dC [N, R], centred
                          const at::Tensor& of_rows,          // dP [R, D]
                          double gap_eps) {
  const auto& spectrum = texts.spectrum;
  const bool features = on_feature_side(texts);
  const int64_t n = spectrum.n, rank = spectrum.rank, dropped = n - rank;
  const auto long_side = features ? x.t() : x;  // [n, max(N, D)]
  const auto of_long = features ? of_coefficients : of_rows.t();
  const auto of_small = features ? of_rows.t() : of_coefficients;
  const auto sum = at::empty({n, rank}, x.options());
  sum.copy_(of_small);
  multiply(long_side, of_long, sum, 1, 1);
  const auto outside = directions<T>(spectrum, rank, dropped);
  const auto pairs = at::empty({dropped, rank}, x.options());
  multiply(outside.t(), sum, pairs, 1, 0);
  const double gap = spectrum.eigenvalues[rank - 1] - spectrum.eigenvalues[rank];
  if (x.scalar_type() != at::kDouble && gap < kNarrow * spectrum.unit()) {
    const int64_t last = std::min(kNear, dropped), first = std::max<int64_t>(0, rank - kNear);
    const auto near = directions<double>(spectrum, rank, last);
    const auto across = long_side.to(at::kDouble).t().mm(near);
    const auto exact =
        across.t().mm(of_long.narrow(1, first, rank - first).to(at::kDouble)) +
        near.t().mm(of_small.narrow(1, first, rank - first).to(at::kDouble));
    pairs.narrow(0, 0, last).narrow(1, first, rank - first).copy_(exact);
  }
  weigh_pairs(spectrum.eigenvalues, rank, spectrum.unit(), gap_eps, 1.0, /*dropped=*/false,
              writable<T>(pairs));
  multiply(outside, pairs, sum, 1, 0);
  return sum;
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
  if (on_feature_side(texts)) {
    multiply(x, basis_grad, of_coefficients, 1, 1);
    multiply(of_coefficients, rows, out, 1, 1);
    multiply(own, basis_grad.t(), out, 1, 1);
    return;
  }
  multiply(basis_grad, rows, out, 1, 1);
  if (!weights.empty()) {  // the part of (6) along B = W^T X is a product with X, like K^T X
    const auto weighted = own.contiguous(), square = at::empty({rank, rank}, own.options());
    T* data = weighted.mutable_data_ptr<T>();
    for (int64_t i = 0; i < own.size(0); ++i) {
      scale_row(data + i * rank, weights[i], rank, data + i * rank);
    }
    multiply(own.t(), weighted, square, 1, 0);
    multiply(own, square, basis_grad, 1, 1);
  }
  multiply(basis_grad.t(), x, of_rows, 1, 1);
  multiply(own, of_rows, out, 1, 1);
}

// out += G Pi without the mean. On the sample side the rows of B are the components times
// sqrt(lambda).
template <typename T>
void add_with_constant_basis(const Texts& texts, const Factors& factors,
                             const at::Tensor& of_coefficients, const at::Tensor& out) {
  const auto& spectrum = texts.spectrum;
  if (!on_feature_side(texts)) {
    const auto inverse = at::zeros({spectrum.rank}, at::kDouble);
    for (int64_t k = 0; k < spectrum.rank && spectrum.is_nonzero(k); ++k) {
      inverse.mutable_data_ptr<double>()[k] = 1 / spectrum.eigenvalues[k];
    }
    of_coefficients.mul_(inverse.to(of_coefficients.dtype()));
  }
  multiply(of_coefficients, factors.basis.narrow(0, 0, spectrum.rank), out, 1, 1);
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
  const T* keys_grad = of_keys.const_data_ptr<T>();
  const T* basis = factors.basis.const_data_ptr<T>();
  T* basis_grad = of_basis.mutable_data_ptr<T>();
  T* coefficients_grad = of_coefficients.mutable_data_ptr<T>();
  std::vector<double> weights;
  if (grad.normalize) {  // (7)
    const T* keys = factors.keys.const_data_ptr<T>();
    const T* coefficients = factors.coefficients.const_data_ptr<T>();
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
    // Adds M B with M = C^T diag(w) C, except M[:R, :R]: O^T removes that part, and (10) adds it
    // where it is needed.
    std::vector<double> shares(rank + 1, 0.0);
    for (int64_t i = 0; i < samples; ++i) {
      add_multiple(weights[i], coefficients + i * (rank + 1), rank + 1, shares.data());
    }
    std::vector<double> of_mean(basis_grad + rank * width, basis_grad + (rank + 1) * width);
    add_multiple(shares[rank], basis + rank * width, width, of_mean.data());
    for (int64_t k = 0; k < rank; ++k) {
      add_multiple(shares[k], basis + k * width, width, of_mean.data());
      add_multiple(shares[k], basis + rank * width, width, basis_grad + k * width);
    }
    convert(of_mean.data(), width, basis_grad + rank * width);
  } else {
    of_coefficients.copy_(of_keys.narrow(1, 0, rank));
  }
  set_column_means(writable<T>(of_coefficients), std::vector<double>(rank, 0.0));
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

bool is_low_rank(const Texts& texts) {
  // Products of factors are float32, which run at half the rate of bfloat16.
  const bool half_rate =
      texts.features.scalar_type() == at::kBFloat16 && multiplies_bfloat16();
  return (texts.spectrum.rank + 1) * (half_rate ? 2 : 1) < texts.features.size(1);
}

}  // namespace

void multiply(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out, double alpha,
              double beta) {
  AT_DISPATCH_FLOATING_TYPES(out.scalar_type(), "multiply", [&] {
    at::Tensor left, right;
    multiply(readable<scalar_t>(a, left), readable<scalar_t>(b, right), writable<scalar_t>(out),
             static_cast<scalar_t>(alpha), static_cast<scalar_t>(beta));
  });
}

ComponentOperands component_operands(const at::Tensor& images, const Texts& texts, bool normalize,
                                     const at::Tensor& cache, bool filled) {
  const auto& features = texts.features;
  const auto& spectrum = texts.spectrum;
  ComponentOperands operands{images, features, false, false, {}};
  if (spectrum.is_nan()) {
    operands.keys = at::full_like(features, NAN);
    return operands;
  }
  if (spectrum.keeps_all()) {
    if (normalize) operands.keys = normalize_fwd(features);
    return operands;
  }
  const auto products = dtype_of_products(texts);
  const auto accumulation = accumulation_dtype(features);
  const auto options = features.options().dtype(products);
  const bool caches = cache.defined() && products == accumulation;
  int64_t used = 0;
  const auto take = [&](int64_t rows, int64_t columns) {
    if (!caches) return at::empty({rows, columns}, options);
    used += rows * columns;
    return cache.narrow(0, used - rows * columns, rows * columns).view({rows, columns});
  };
  const int64_t samples = features.size(0), stride = spectrum.rank + 1;
  auto& factors = operands.factors;
  operands.has_factors = true;
  factors.coefficients = take(samples, stride);
  factors.basis = take(stride, features.size(1));
  AT_DISPATCH_FLOATING_TYPES(products, "component_operands", [&] {
    factors.centred = centred<scalar_t>(texts);
    if (!(caches && filled)) write_factors<scalar_t>(texts, factors);
    write_keys<scalar_t>(texts, normalize, factors);
  });
  if (is_low_rank(texts)) {
    const auto query = take(samples, stride);
    if (!(caches && filled)) {
      multiply(images.to(options.dtype()), factors.basis.t(), query, 1, 0);  // (3)
    }
    operands.low_rank = true;
    operands.query = query.to(accumulation);
    operands.keys = factors.keys.to(accumulation);
  } else {
    const auto dense = at::empty(features.sizes(), options);
    multiply(factors.keys, factors.basis, dense, 1, 0);
    operands.keys = dense.to(features.scalar_type());
  }
  return operands;
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
