// The loops of row_loops.h. Included once by each loops_<instruction set>.cpp; the rule in
// isa_lanes.h applies. Equation numbers refer to himo_kernels/normalize/README.md.

#include <cstdint>

#include "cpu/isa_lanes.h"
#include "cpu/row_loops.h"

namespace himo::cpu::HIMO_ISA {
namespace {

template <typename element_t>
using sums_t = typename SumsOf<element_t>::type;
template <typename element_t>
using lanes_of = typename Lanes<sums_t<element_t>>::type;

using Words = uint32_t __attribute__((vector_size(HIMO_VECTOR_BYTES)));
using Halves = uint16_t __attribute__((vector_size(HIMO_VECTOR_BYTES / 2)));
using FloatLanes = Lanes<float>::type;

HIMO_INLINE Words load_halves(const void* source) {
  Halves halves;
  __builtin_memcpy(&halves, source, sizeof(halves));
  return __builtin_convertvector(halves, Words);
}

HIMO_INLINE void store_halves(void* target, Words value) {
  const Halves halves = __builtin_convertvector(value, Halves);
  __builtin_memcpy(target, &halves, sizeof(halves));
}

HIMO_INLINE FloatLanes raised(const float* x) { return load<float>(x); }
HIMO_INLINE Lanes<double>::type raised(const double* x) { return load<double>(x); }
HIMO_INLINE FloatLanes raised(const BFloat16Bits* x) { return (FloatLanes)(load_halves(x) << 16); }
HIMO_INLINE FloatLanes raised(const HalfBits* x) {
  const Words bits = load_halves(x), sign = (bits & 0x8000) << 16;
  const Words magnitude = (bits & 0x7fff) << 13, exponent = bits & 0x7c00;
  constexpr uint32_t kShift = (127 - 15) << 23;  // from half's bias to float's
  const Words normal = magnitude + kShift;
  const Words special = normal + kShift;  // infinity and NaN
  // A subnormal has half's smallest exponent and no implicit leading one: subtract that one.
  const FloatLanes subnormal = (FloatLanes)(normal + (1 << 23)) - 0x1p-14f;
  const Words finite = exponent == 0 ? (Words)subnormal : normal;
  return (FloatLanes)(sign | (exponent == 0x7c00 ? special : finite));
}

// Rounds to nearest, ties to even.
HIMO_INLINE void lower(FloatLanes value, float* out) { store<float>(out, value); }
HIMO_INLINE void lower(Lanes<double>::type value, double* out) { store<double>(out, value); }
HIMO_INLINE void lower(FloatLanes value, BFloat16Bits* out) {
  const Words bits = (Words)value;
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  store_halves(out, value != value ? Words{} + 0x7fc0 : rounded);
}
HIMO_INLINE void lower(FloatLanes value, HalfBits* out) {
  const Words bits = (Words)value, sign = bits & 0x80000000, magnitude = bits ^ sign;
  constexpr uint32_t kShift = (127 - 15) << 23, kSmallestNormal = (127 - 14) << 23;
  constexpr uint32_t kInfinity = 0x7f800000, kTooLarge = (127 + 16) << 23;
  const Words normal = (magnitude - kShift + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // The ulp of 0.5f is half's smallest subnormal, so this addition rounds to a multiple of it.
  const Words subnormal = (Words)((FloatLanes)magnitude + 0.5f) - 0x3f000000;
  const Words finite = magnitude < kSmallestNormal ? subnormal : normal;
  const Words special = magnitude > kInfinity ? Words{} + 0x7e00 : Words{} + 0x7c00;
  store_halves(out, (magnitude >= kTooLarge ? special : finite) | (sign >> 16));
}

// Loads the entries of a row from j on, zero-padded.
template <typename element_t>
HIMO_INLINE lanes_of<element_t> last_entries(const element_t* x, int64_t j, int64_t size) {
  element_t last[Lanes<sums_t<element_t>>::count] = {};
  for (int64_t k = 0; j + k < size; ++k) last[k] = x[j + k];
  return raised(last);
}

template <typename element_t>
HIMO_INLINE void store_last(lanes_of<element_t> value, element_t* out, int64_t j, int64_t size) {
  element_t last[Lanes<sums_t<element_t>>::count];
  lower(value, last);
  for (int64_t k = 0; j + k < size; ++k) out[j + k] = last[k];
}

template <typename acc_t>
struct Number;
template <>
struct Number<float> {
  using bits = uint32_t;
  static constexpr int kMantissa = 23;
  static constexpr bits kBias = 127;
  static constexpr float kMax = __FLT_MAX__, kNaN = __builtin_nanf("");
};
template <>
struct Number<double> {
  using bits = uint64_t;
  static constexpr int kMantissa = 52;
  static constexpr bits kBias = 1023;
  static constexpr double kMax = __DBL_MAX__, kNaN = __builtin_nan("");
};

// Returns 2^-e, with e the exponent of `largest`, clamped so that 2^-e and 2^e are normal numbers.
template <typename acc_t>
HIMO_INLINE acc_t power_that_scales(acc_t largest) {  // >= 0
  using N = Number<acc_t>;
  typename N::bits bits;
  __builtin_memcpy(&bits, &largest, sizeof(bits));
  typename N::bits exponent = bits >> N::kMantissa;
  if (exponent < 1) exponent = 1;
  if (exponent > 2 * N::kBias - 1) exponent = 2 * N::kBias - 1;
  bits = (2 * N::kBias - exponent) << N::kMantissa;
  acc_t scale;
  __builtin_memcpy(&scale, &bits, sizeof(bits));
  return scale;
}

// Largest magnitude in a row; the row must not contain NaN.
template <typename element_t>
sums_t<element_t> largest_entry(const element_t* x, int64_t size) {
  using acc_t = sums_t<element_t>;
  constexpr int64_t step = Lanes<acc_t>::count;
  const int64_t whole = size / step * step;
  lanes_of<element_t> most{};
  const auto visit = [&](lanes_of<element_t> value) {
    most = larger(value < 0 ? -value : value, most);
  };
  for (int64_t j = 0; j < whole; j += step) visit(raised(x + j));
  if (whole < size) visit(last_entries(x, whole, size));
  return largest<acc_t>(most);
}

// Rows with |x|^2 in this range are not rescaled. For other rows the squares, or the products with
// a gradient, may underflow or overflow although the result, which is their quotient, does not.
constexpr float kLeastSquares = 0x1p-20f, kMostSquares = 0x1p40f;

template <typename acc_t>
struct Row {
  acc_t scale;    // a power of two, 1 unless the row is much shorter or longer than 1
  acc_t squares;  // |u|^2, u = scale x
  acc_t along;    // grad . u
};

// Sums in four independent chains to hide the latency of an addition.
template <bool kWithGrad, typename element_t>
HIMO_INLINE Row<sums_t<element_t>> sum_up(const element_t* x, const element_t* grad, int64_t size,
                                          sums_t<element_t> scale) {
  using acc_t = sums_t<element_t>;
  constexpr int64_t step = Lanes<acc_t>::count, chains = 4;
  lanes_of<element_t> squares[chains] = {}, along[chains] = {};
  const auto add = [&](int64_t k, lanes_of<element_t> value, lanes_of<element_t> incoming) {
    value *= scale;
    squares[k] += value * value;
    if constexpr (kWithGrad) along[k] += value * incoming;
  };
  int64_t j = 0;
  for (; j + chains * step <= size; j += chains * step) {
#pragma GCC unroll 4
    for (int64_t k = 0; k < chains; ++k) {
      const int64_t at = j + k * step;
      add(k, raised(x + at), kWithGrad ? raised(grad + at) : lanes_of<element_t>{});
    }
  }
  for (; j + step <= size; j += step) {
    add(0, raised(x + j), kWithGrad ? raised(grad + j) : lanes_of<element_t>{});
  }
  if (j < size) {
    add(1, last_entries(x, j, size),
        kWithGrad ? last_entries(grad, j, size) : lanes_of<element_t>{});
  }
  return {scale, total<acc_t>((squares[0] + squares[1]) + (squares[2] + squares[3])),
          total<acc_t>((along[0] + along[1]) + (along[2] + along[3]))};
}

template <bool kWithGrad, typename element_t>
HIMO_INLINE Row<sums_t<element_t>> measure(const element_t* x, const element_t* grad,
                                           int64_t size) {
  const auto row = sum_up<kWithGrad>(x, grad, size, 1);
  if (row.squares >= kLeastSquares && row.squares <= kMostSquares) return row;
  return sum_up<kWithGrad>(x, grad, size, power_that_scales(largest_entry(x, size)));
}

// 1 / |u|, rounded once; NaN if the row contains NaN or infinity.
template <typename acc_t>
HIMO_INLINE acc_t inverse_length(const Row<acc_t>& row) {
  if (!(row.squares <= Number<acc_t>::kMax)) return Number<acc_t>::kNaN;
  return static_cast<acc_t>(1.0 / __builtin_sqrt(static_cast<double>(row.squares)));
}

template <typename element_t>
HIMO_INLINE void set_zero(element_t* out, int64_t size) {
  for (int64_t j = 0; j < size; ++j) out[j] = element_t{};
}

template <typename element_t>
void normalize(const element_t* x, int64_t size, element_t* normalized) {
  constexpr int64_t step = Lanes<sums_t<element_t>>::count;
  const auto row = measure<false>(x, x, size);
  if (row.squares == 0) return set_zero(normalized, size);
  const auto inverse = inverse_length(row);
  const auto of = [&](lanes_of<element_t> value) { return value * row.scale * inverse; };  // (2)
  const int64_t whole = size / step * step;
  for (int64_t j = 0; j < whole; j += step) lower(of(raised(x + j)), normalized + j);
  if (whole < size) store_last(of(last_entries(x, whole, size)), normalized, whole, size);
}

template <typename element_t>
void normalize_gradient(const element_t* grad, const element_t* x, int64_t size,
                        element_t* grad_x) {
  constexpr int64_t step = Lanes<sums_t<element_t>>::count;
  const auto row = measure<true>(x, grad, size);
  if (row.squares == 0) return set_zero(grad_x, size);
  const auto inverse = inverse_length(row);
  const auto share = row.along * inverse * inverse;
  // (3). Two multiplications, because scale / |u| may overflow although the result does not.
  const auto of = [&](lanes_of<element_t> incoming, lanes_of<element_t> value) {
    return (incoming - value * row.scale * share) * inverse * row.scale;
  };
  const int64_t whole = size / step * step;
  for (int64_t j = 0; j < whole; j += step) lower(of(raised(grad + j), raised(x + j)), grad_x + j);
  if (whole < size) {
    store_last(of(last_entries(grad, whole, size), last_entries(x, whole, size)), grad_x, whole,
               size);
  }
}

template <typename element_t>
sums_t<element_t> product(const element_t* x, const element_t* y, int64_t size) {
  return sum_up<true>(x, y, size, 1).along;
}

}  // namespace

extern const RowLoopsOfEach row_loops;
const RowLoopsOfEach row_loops = {
    {normalize<float>, normalize_gradient<float>, product<float>},
    {normalize<double>, normalize_gradient<double>, product<double>},
    {normalize<BFloat16Bits>, normalize_gradient<BFloat16Bits>, product<BFloat16Bits>},
    {normalize<HalfBits>, normalize_gradient<HalfBits>, product<HalfBits>},
};

}  // namespace himo::cpu::HIMO_ISA
