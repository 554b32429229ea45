#include "cpu/component_factors.h"

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/check.h"
#include "cpu/centring.h"
#include "cpu/tensor_matrix.h"
#include "cpu/tile_products.h"
#include "normalize.h"

namespace himo::cpu {
namespace {

// If the mean square of X is in this range, no float32 product overflows or underflows.
constexpr double kSmallest = 1e-20, kLargest = 1e20;
// Bound on the rounding error of V B^T C^T, in units of eps |mean|.
constexpr double kRoundings = 16;
// Losses share products of at least so many samples: with fewer, dU is more exact from the
// components, and decomposing the texts takes most of the time.
constexpr int64_t kFewest = 64;
// Shared products of more bytes would leave the caches.
constexpr int64_t kMostBytes = 1 << 20;

double eps_of(at::ScalarType dtype) {
  return dtype == at::kDouble ? std::numeric_limits<double>::epsilon()
                              : std::numeric_limits<float>::epsilon();
}

at::ScalarType dtype_of_products(const Texts& texts) {
  if (texts.features.scalar_type() == at::kDouble) return at::kDouble;
  const double mean_square = texts.spectrum.trace() / static_cast<double>(texts.features.numel());
  const bool in_range = mean_square >= kSmallest && mean_square <= kLargest;
  return in_range && fits_float32(texts.spectrum) ? at::kFloat : at::kDouble;
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

// Returns X in the memory order of the features, so that reads and writes are contiguous.
template <typename T>
at::Tensor centred(const Texts& texts) {
  const int64_t samples = texts.features.size(0), width = texts.features.size(1);
  const auto out =
      at::empty({samples * width}, at::TensorOptions(c10::CppTypeToScalarType<T>::value));
  const Block whole{0, 1, 0, samples, 0, width};
  const bool by_rows = centre(texts.features, texts.mean, whole, 1.0, out.mutable_data_ptr<T>());
  return by_rows ? out.view({samples, width}) : out.view({width, samples}).t();
}

// Writes C and B; README (1).
template <typename T>
void write_factors(const Texts& texts, Factors& factors) {
  const auto& spectrum = texts.spectrum;
  const int64_t rank = spectrum.rank, samples = factors.coefficients.size(0);
  const auto own = factors.coefficients.narrow(1, 0, rank), rows = factors.basis.narrow(0, 0, rank);
  const auto kept = directions<T>(spectrum, 0, rank);
  if (feature_side(texts.features)) {
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

// Writes nu and C / nu of README (2), from m / l and the squared length of the part of the mean
// that is orthogonal to B. logits_eps is the machine epsilon of the products of factors.
template <typename T>
void write_keys(const std::vector<double>& along, double rest, double mean_square,
                double logits_eps, Factors& factors) {
  const int64_t samples = factors.coefficients.size(0), stride = factors.coefficients.size(1);
  const T* coefficients = factors.coefficients.const_data_ptr<T>();
  // A text whose components cancel its mean has no direction left: only the rounding of its
  // logits, which 1 / nu makes as large as other logits, or larger. It counts as a row of zeros.
  const double rounding = kRoundings * logits_eps * std::sqrt(mean_square);
  factors.length.resize(samples);
  factors.keys = at::empty_like(factors.coefficients);
  T* keys = factors.keys.mutable_data_ptr<T>();
  for_rows(samples, stride, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T* row = coefficients + i * stride;
      double length =
          std::sqrt(squared_length(row, along.data(), factors.squares.data(), stride - 1) + rest);
      if (length <= rounding) length = 0;
      factors.length[i] = length;
      // A row of zeros has no direction, as in normalize.
      scale_row(row, length == 0 ? 0.0 : 1 / length, stride, keys + i * stride);
    }
  });
}

// README (2): u' = (C + m / l) B + (part of the mean orthogonal to B). Orthogonal terms do not
// cancel. Writes l, m, nu and C / nu.
template <typename T>
void write_lengths(const Texts& texts, bool normalize, double logits_eps, Factors& factors) {
  const auto& spectrum = texts.spectrum;
  const int64_t rank = spectrum.rank, width = factors.basis.size(1);
  const T* basis = factors.basis.const_data_ptr<T>();
  const T* mean = basis + rank * width;
  factors.squares.assign(rank, 1.0);
  if (!feature_side(texts.features))
    std::copy_n(spectrum.eigenvalues, rank, factors.squares.begin());
  factors.overlaps.resize(rank);
  std::vector<double> along(rank, 0.0);
  for (int64_t k = 0; k < rank; ++k) {
    factors.overlaps[k] = dot(basis + k * width, mean, width);
    if (feature_side(texts.features) || spectrum.is_nonzero(k)) {
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
  write_keys<T>(along, dot(across.data(), across.data(), width), dot(mean, mean, width), logits_eps,
                factors);
}

// With shared products, N < D: writes C, l, m, nu and C / nu without B = [W^T X ; mu].
template <typename T>
void write_factors_without_basis(const Texts& texts, bool normalize, Factors& factors) {
  const auto& spectrum = texts.spectrum;
  const int64_t rank = spectrum.rank, stride = rank + 1;
  const int64_t samples = texts.features.size(0), width = texts.features.size(1);
  factors.coefficients = at::empty({samples, stride}, factors.centred.options());
  factors.coefficients.narrow(1, 0, rank).copy_(directions<T>(spectrum, 0, rank));
  T* coefficients = factors.coefficients.mutable_data_ptr<T>();
  for (int64_t i = 0; i < samples; ++i) coefficients[i * stride + rank] = 1;
  factors.along_mean = products_with_mean(factors.centred, texts);
  factors.squares.assign(spectrum.eigenvalues, spectrum.eigenvalues + rank);
  factors.overlaps.assign(rank, 0.0);
  for (int64_t i = 0; i < samples; ++i) {  // m = W^T X mu
    add_multiple(factors.along_mean[i], coefficients + i * stride, rank, factors.overlaps.data());
  }
  if (!normalize) {
    factors.keys = factors.coefficients;
    return;
  }
  std::vector<double> along(rank), across(texts.mean, texts.mean + width);
  for (int64_t k = 0; k < rank; ++k) along[k] = factors.overlaps[k] / factors.squares[k];
  const auto x = factors.centred.contiguous();
  for (int64_t i = 0; i < samples; ++i) {  // mu - X^T W (m / l)
    double share = 0;
    for (int64_t k = 0; k < rank; ++k) share += coefficients[i * stride + k] * along[k];
    add_multiple(-share, x.const_data_ptr<T>() + i * width, width, across.data());
  }
  write_keys<T>(along, dot(across.data(), across.data(), width), dot(texts.mean, texts.mean, width),
                std::numeric_limits<T>::epsilon(), factors);
}

// out = row + value
template <typename T>
HIMO_WIDE void add_to_row(const T* row, double value, int64_t size, T* out) {
  for (int64_t k = 0; k < size; ++k) out[k] = static_cast<T>(row[k] + value);
}

bool is_low_rank(const Texts& texts) {
  // Products of factors are float32, which run at half the rate of bfloat16.
  const bool half_rate = texts.features.scalar_type() == at::kBFloat16 && multiplies_bfloat16();
  return (texts.spectrum.rank + 1) * (half_rate ? 2 : 1) < texts.features.size(1);
}

}  // namespace

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
  operands.low_rank = is_low_rank(texts);
  factors.coefficients = take(samples, stride);
  factors.basis = take(stride, features.size(1));
  AT_DISPATCH_FLOATING_TYPES(products, "component_operands", [&] {
    factors.centred = centred<scalar_t>(texts);
    if (!(caches && filled)) write_factors<scalar_t>(texts, factors);
    write_lengths<scalar_t>(texts, normalize, eps_of(operands.low_rank ? accumulation : products),
                            factors);
  });
  if (operands.low_rank) {
    const auto query = take(samples, stride);
    if (!(caches && filled)) {
      multiply(images.to(options.dtype()), factors.basis.t(), query, 1, 0);  // (3)
    }
    operands.query = query.to(accumulation);
    operands.keys = factors.keys.to(accumulation);
  } else {
    const auto dense = at::empty(features.sizes(), options);
    multiply(factors.keys, factors.basis, dense, 1, 0);
    operands.keys = dense.to(features.scalar_type());
  }
  return operands;
}

bool shares_products(const Texts& texts) {
  const auto& spectrum = texts.spectrum;
  const auto& features = texts.features;
  const int64_t samples = features.size(0), width = features.size(1), rank = spectrum.rank;
  if (samples < kFewest || feature_side(features) || spectrum.is_nan() || spectrum.keeps_all())
    return false;
  if (!is_computing_dtype(features.scalar_type()) || !spectrum.is_nonzero(rank - 1)) return false;
  if (dtype_of_products(texts) != features.scalar_type()) return false;
  // The eight products of R x D matrices against one of N x D and eight of N x R.
  return samples * samples * features.element_size() <= kMostBytes &&
         8 * rank * (width - samples) > samples * width;
}

at::Tensor centred_texts(const Texts& texts) {
  return texts.features.scalar_type() == at::kDouble ? centred<double>(texts)
                                                     : centred<float>(texts);
}

std::vector<double> products_with_mean(const at::Tensor& x, const Texts& texts) {
  const auto rows = x.contiguous();
  const int64_t samples = rows.size(0), width = rows.size(1);
  std::vector<double> products(samples);
  AT_DISPATCH_FLOATING_TYPES(rows.scalar_type(), "products_with_mean", [&] {
    for_rows(samples, width, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        products[i] = dot(rows.const_data_ptr<scalar_t>() + i * width, texts.mean, width);
      }
    });
  });
  return products;
}

void write_logits(const SharedProducts& shared, const at::Tensor& out) {
  const int64_t samples = out.size(0);
  if (shared.along_mean.empty()) {
    out.copy_(shared.products);
    return;
  }
  AT_DISPATCH_FLOATING_TYPES(out.scalar_type(), "write_logits", [&] {
    const scalar_t* products = shared.products.const_data_ptr<scalar_t>();
    scalar_t* logits = out.mutable_data_ptr<scalar_t>();
    for (int64_t i = 0; i < samples; ++i) {
      add_to_row(products + i * samples, shared.along_mean[i], samples, logits + i * samples);
    }
  });
}

void add_along_mean(const at::Tensor& factors, const Texts& texts, const at::Tensor& out) {
  const int64_t samples = out.size(0), width = out.size(1);
  const double* factor = factors.const_data_ptr<double>();
  AT_DISPATCH_FLOATING_TYPES(out.scalar_type(), "add_along_mean", [&] {
    scalar_t* sums = out.mutable_data_ptr<scalar_t>();
    for_rows(samples, width, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        add_multiple(factor[i], texts.mean, width, sums + i * width);
      }
    });
  });
}

ComponentOperands operands_from_products(const SharedProducts& shared, const Texts& texts,
                                         bool normalize) {
  ComponentOperands operands;
  operands.low_rank = operands.has_factors = true;
  operands.factors.centred = shared.centred;
  const int64_t samples = shared.products.size(0), stride = texts.spectrum.rank + 1;
  AT_DISPATCH_FLOATING_TYPES(shared.products.scalar_type(), "operands_from_products", [&] {
    write_factors_without_basis<scalar_t>(texts, normalize, operands.factors);
    operands.keys = operands.factors.keys;
    operands.query = at::empty({samples, stride}, operands.keys.options());
    multiply(shared.products, operands.factors.coefficients.narrow(1, 0, stride - 1),
             operands.query.narrow(1, 0, stride - 1), 1, 0);  // (12)
    scalar_t* last = operands.query.mutable_data_ptr<scalar_t>() + stride - 1;
    for (int64_t i = 0; i < samples; ++i) {
      last[i * stride] = static_cast<scalar_t>(shared.along_mean[i]);
    }
  });
  return operands;
}

void write_gradient_of_products(const at::Tensor& of_query, const ComponentOperands& operands,
                                bool through_basis, const at::Tensor& out) {
  const int64_t samples = of_query.size(0), rank = of_query.size(1) - 1;
  if (!through_basis) {
    out.copy_(of_query.narrow(1, rank, 1).div(samples).expand_as(out));
    return;
  }
  const auto scaled = of_query.clone();
  scaled.select(1, rank).div_(samples);
  multiply(scaled, operands.factors.coefficients.t(), out, 1, 0);
}

}  // namespace himo::cpu
