// The loops of tile_loops.h. Each loops_<instruction set>.cpp enables its instruction set and
// then includes this file. Nothing here may instantiate a standard library template: the linker
// could pick that copy, built for the wrong instruction set, for other files.

#include <cstdint>

#include "cpu/isa_lanes.h"
#include "cpu/tile_loops.h"

namespace himo::cpu::HIMO_ISA {
namespace {

// Returns the rounded product and prevents contraction into a fused multiply-subtract. If only one
// of the passes used an unrounded S in S - p, the probabilities of a row would not sum to 1.
template <typename acc_t>
HIMO_INLINE typename Lanes<acc_t>::type rounded_product(typename Lanes<acc_t>::type a, acc_t b) {
  auto product = a * b;
#if HIMO_VECTOR_BYTES == 64
  __asm__("" : "+v"(product));
#elif defined(__x86_64__)
  __asm__("" : "+x"(product));
#elif defined(__aarch64__)
  __asm__("" : "+w"(product));
#endif
  return product;
}

// exp(x) = 2^n exp(r) with n the integer nearest to x / ln 2, so |r| <= ln 2 / 2. ln 2 is split in
// two so that n * kLn2High is exact. exp(r) is its Taylor series up to the first term below one
// ulp. The result is 0 below kSmallest, infinity above kLargest, and NaN for NaN.
template <typename acc_t>
struct Exponential;
template <>
struct Exponential<float> {
  static constexpr float kLog2E = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kSmallest = -87.0f, kLargest = 88.0f;
  static constexpr int32_t kOne = 0x3f800000, kMantissa = 23;  // bits of 1.0f
  static constexpr int kDegree = 7;
};
template <>
struct Exponential<double> {
  static constexpr double kLog2E = 1.4426950408889634, kLn2High = 0.693147180369123816490,
                          kLn2Low = 1.90821492927058770002e-10;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kSmallest = -708.0, kLargest = 709.0;
  static constexpr int64_t kOne = 0x3ff0000000000000, kMantissa = 52;
  static constexpr int kDegree = 13;
};

constexpr double kInverseFactorials[] = {1.0,
                                         1.0,
                                         1.0 / 2,
                                         1.0 / 6,
                                         1.0 / 24,
                                         1.0 / 120,
                                         1.0 / 720,
                                         1.0 / 5040,
                                         1.0 / 40320,
                                         1.0 / 362880,
                                         1.0 / 3628800,
                                         1.0 / 39916800,
                                         1.0 / 479001600,
                                         1.0 / 6227020800.0};

template <typename acc_t>
HIMO_INLINE typename Lanes<acc_t>::type exponential(typename Lanes<acc_t>::type x) {
  using lanes_t = typename Lanes<acc_t>::type;
  using bits_t = typename Lanes<acc_t>::bits;
  using E = Exponential<acc_t>;
  const lanes_t capped = x > E::kLargest ? fill<acc_t>(E::kLargest) : x;
  const lanes_t rounded = capped * E::kLog2E + E::kRound;
  const lanes_t n = rounded - E::kRound;
  const lanes_t r = (capped - n * E::kLn2High) - n * E::kLn2Low;
  lanes_t series = fill<acc_t>(static_cast<acc_t>(kInverseFactorials[E::kDegree]));
#pragma GCC unroll 16
  for (int k = E::kDegree - 1; k >= 0; --k) {
    series = series * r + static_cast<acc_t>(kInverseFactorials[k]);
  }
  // The low bits of `rounded` hold n; shifted into the exponent, they give 2^n.
  const bits_t power = ((bits_t)rounded << E::kMantissa) + E::kOne;
  const lanes_t value = series * (lanes_t)power;
  const lanes_t bounded = x > E::kLargest ? fill<acc_t>(__builtin_inf()) : value;
  return x < E::kSmallest ? lanes_t{} : bounded;
}

// logits = scale * products, -inf at the positives and past the last column.
template <typename acc_t>
void scale_tile(const StatisticsTile<acc_t>& tile) {
  constexpr int64_t step = Lanes<acc_t>::count;
  constexpr acc_t kMinusInfinity = -__builtin_inf();
  const int64_t width = padded(tile.columns), whole = tile.columns / step * step;
  for (int64_t i = 0; i < tile.rows; ++i) {
    const acc_t* products = tile.products + i * tile.products_stride;
    acc_t* logits = tile.logits + i * width;
    for (int64_t j = 0; j < whole; j += step) {
      store<acc_t>(logits + j, rounded_product<acc_t>(load<acc_t>(products + j), tile.scale));
    }
    for (int64_t j = whole; j < tile.columns; ++j) logits[j] = products[j] * tile.scale;
    for (int64_t j = tile.columns; j < width; ++j) logits[j] = kMinusInfinity;
    const int64_t positive = tile.diagonal + i;
    if (0 <= positive && positive < tile.columns) logits[positive] = kMinusInfinity;
  }
}

// One exponential per entry serves both directions. With a_i = p_i + M_i of a row, b_j the same of
// a column and c the largest a_i of the tile,
//   exp(S_ij - b_j) = exp(S_ij - a_i) exp(a_i - c) exp(c - b_j),
// and the last two factors are made once per row and column. exp(S_ij - a_i) underflows at -87,
// where a column whose b_j is far below c may still need it: in_range is false in such a tile,
// which takes two exponentials.
template <typename acc_t>
struct Ratios {
  acc_t rows[kTileRows];        // exp(a_i - c)
  acc_t columns[kTileColumns];  // exp(c - b_j), up to padded(columns); 1 if not in_range
  bool in_range;

  Ratios() = default;

  // a = row_positives + row_logs, b = column_positives + column_logs. In float64: at logits near
  // 100, float32 would leave an error of 1e-5 in every entry of a row or column.
  Ratios(int64_t row_count, int64_t column_count, const acc_t* row_positives, const acc_t* row_logs,
         const acc_t* column_positives, const acc_t* column_logs) {
    constexpr double kRange = 40;
    double a[kTileRows] = {}, b[kTileColumns] = {};
    double most = -__builtin_inf(), least = __builtin_inf();
    for (int64_t i = 0; i < row_count; ++i) {
      a[i] = static_cast<double>(row_positives[i]) + static_cast<double>(row_logs[i]);
      most = a[i] > most ? a[i] : most;
    }
    for (int64_t j = 0; j < column_count; ++j) {
      b[j] = static_cast<double>(column_positives[j]) + static_cast<double>(column_logs[j]);
      least = b[j] < least ? b[j] : least;
    }
    in_range = most - least < kRange;  // false for NaN
    for (int64_t i = 0; i < row_count; ++i) a[i] -= most;
    for (int64_t j = 0; j < column_count; ++j) b[j] = in_range ? most - b[j] : 0;
    exponentials(a, row_count, rows);
    exponentials(b, padded(column_count), columns);
  }

 private:
  static void exponentials(const double* x, int64_t count, acc_t* out) {
    constexpr int64_t step = Lanes<double>::count;
    for (int64_t k = 0; k < count; k += step) {
      double values[step];
      store<double>(values, exponential<double>(load<double>(x + k)));
      for (int64_t lane = 0; lane < step; ++lane) out[k + lane] = static_cast<acc_t>(values[lane]);
    }
  }
};

template <typename acc_t>
void statistics(const StatisticsTile<acc_t>& tile) {
  using lanes_t = typename Lanes<acc_t>::type;
  constexpr int64_t step = Lanes<acc_t>::count;
  const int64_t width = padded(tile.columns);
  scale_tile(tile);
  for (int64_t j = 0; j < width; j += step) {
    store<acc_t>(tile.column_old_max + j, load<acc_t>(tile.column_max + j));
  }
  for (int64_t i = 0; i < tile.rows; ++i) {
    const acc_t* logits = tile.logits + i * width;
    const lanes_t positive = fill<acc_t>(tile.row_positives[i]);
    lanes_t row_max = fill<acc_t>(tile.row_max[i]);
    for (int64_t j = 0; j < width; j += step) {
      const lanes_t logit = load<acc_t>(logits + j);
      row_max = larger(logit - positive, row_max);
      store<acc_t>(tile.column_max + j, larger(logit - load<acc_t>(tile.column_positives + j),
                                               load<acc_t>(tile.column_max + j)));
    }
    const acc_t old_max = tile.row_max[i], new_max = largest<acc_t>(row_max);
    tile.row_max[i] = new_max;
    if (new_max > old_max) {
      tile.row_sum[i] *= exponential<acc_t>(fill<acc_t>(old_max - new_max))[0];
    }
  }
  for (int64_t j = 0; j < width; j += step) {
    const lanes_t change = load<acc_t>(tile.column_old_max + j) - load<acc_t>(tile.column_max + j);
    store<acc_t>(tile.column_sum + j,
                 load<acc_t>(tile.column_sum + j) * exponential<acc_t>(change));
  }
  const Ratios<acc_t> ratios(tile.rows, tile.columns, tile.row_positives, tile.row_max,
                             tile.column_positives, tile.column_max);
  acc_t sums[kTileColumns] = {};  // of exp(S - p_i - M_i) times its row's ratio
  for (int64_t i = 0; i < tile.rows; ++i) {
    const acc_t* logits = tile.logits + i * width;
    const lanes_t positive = fill<acc_t>(tile.row_positives[i]);
    const lanes_t row_max = fill<acc_t>(tile.row_max[i]);
    lanes_t row_sum{};
    for (int64_t j = 0; j < width; j += step) {
      const lanes_t logit = load<acc_t>(logits + j);
      // Two subtractions, because S - p is exact where the two are close; p + M would be rounded.
      const lanes_t power = exponential<acc_t>((logit - positive) - row_max);
      row_sum += power;
      lanes_t column = power * ratios.rows[i];
      if (!ratios.in_range) {
        column = exponential<acc_t>((logit - load<acc_t>(tile.column_positives + j)) -
                                    load<acc_t>(tile.column_max + j));
      }
      store<acc_t>(sums + j, load<acc_t>(sums + j) + column);
    }
    tile.row_sum[i] += total<acc_t>(row_sum);
  }
  for (int64_t j = 0; j < width; j += step) {
    store<acc_t>(tile.column_sum + j, load<acc_t>(tile.column_sum + j) +
                                          load<acc_t>(sums + j) * load<acc_t>(ratios.columns + j));
  }
}

// P_ii - (1 - smoothing) - share at the positive. P_ii - 1 = expm1(-nll) avoids cancellation.
template <typename acc_t>
HIMO_INLINE acc_t positive_part(acc_t nll, acc_t smoothing, acc_t share) {
  return static_cast<acc_t>(__builtin_expm1(-static_cast<double>(nll))) + smoothing - share;
}

template <typename acc_t>
double gradient(const GradientTile<acc_t>& tile) {
  using lanes_t = typename Lanes<acc_t>::type;
  constexpr int64_t step = Lanes<acc_t>::count;
  const int64_t width = padded(tile.columns), whole = tile.columns / step * step;
  const Ratios<acc_t> ratios(tile.rows, tile.columns, tile.row_positives, tile.row_nll,
                             tile.column_positives, tile.column_nll);
  double grad_scale = 0;
  for (int64_t i = 0; i < tile.rows; ++i) {
    const acc_t* products = tile.products + i * tile.products_stride;
    acc_t* row_part = tile.row_part + i * width;
    acc_t* column_part = tile.column_part == nullptr ? nullptr : tile.column_part + i * width;
    const lanes_t row_positive = fill<acc_t>(tile.row_positives[i]);
    const lanes_t row_nll = fill<acc_t>(tile.row_nll[i]);
    const int64_t positive = tile.diagonal + i;
    // Writes one vector of columns from j on and adds to the gradient of scale.
    lanes_t sum{};
    const auto step_at = [&](int64_t j, lanes_t product) {
      const lanes_t logit = rounded_product<acc_t>(product, tile.scale);
      const lanes_t power = exponential<acc_t>((logit - row_positive) - row_nll);
      lanes_t row = power - tile.share;
      lanes_t column = power * ratios.rows[i] * load<acc_t>(ratios.columns + j) - tile.share;
      if (!ratios.in_range) {
        column = exponential<acc_t>((logit - load<acc_t>(tile.column_positives + j)) -
                                    load<acc_t>(tile.column_nll + j)) -
                 tile.share;
      }
      if (j <= positive && positive < j + step) {
        row[positive - j] = positive_part(tile.row_nll[i], tile.smoothing, tile.share);
        column[positive - j] = positive_part(tile.column_nll[positive], tile.smoothing, tile.share);
      }
      if (j + step > tile.columns) {
        for (int64_t k = 0; k < step; ++k) {
          if (j + k >= tile.columns) row[k] = column[k] = 0;
        }
      }
      row *= tile.row_weight[i];
      column *= load<acc_t>(tile.column_weight + j);
      sum += (row + column) * product;
      if (column_part == nullptr) {
        store<acc_t>(row_part + j, (row + column) * tile.factor);
      } else {
        store<acc_t>(row_part + j, row * tile.factor);
        store<acc_t>(column_part + j, column * tile.factor);
      }
    };
    for (int64_t j = 0; j < whole; j += step) step_at(j, load<acc_t>(products + j));
    for (int64_t j = whole; j < width; j += step) {  // the products are not padded
      step_at(j, load_first<acc_t>(products + j, tile.columns - j));
    }
    grad_scale += static_cast<double>(total<acc_t>(sum));
  }
  return grad_scale;
}

#include "cpu/sigmoid_loops_body.h"

HIMO_INLINE float convert(float value, float*) { return value; }
HIMO_INLINE double convert(double value, double*) { return value; }
HIMO_INLINE uint16_t convert(float value, uint16_t*) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);  // ties to even
  return static_cast<uint16_t>((value != value ? 0x7fc00000 : rounded) >> 16);
}

HIMO_INLINE void store_as(float* target, Lanes<float>::type value) { store(target, value); }
HIMO_INLINE void store_as(double* target, Lanes<double>::type value) { store(target, value); }
HIMO_INLINE void store_as(uint16_t* target, Lanes<float>::type value) {
  using bits_t = uint32_t __attribute__((vector_size(HIMO_VECTOR_BYTES)));
  using half_t = uint16_t __attribute__((vector_size(HIMO_VECTOR_BYTES / 2)));
  const bits_t bits = (bits_t)value;
  const bits_t rounded = bits + 0x7fff + ((bits >> 16) & 1);  // ties to even
  const bits_t result = value != value ? bits_t{} + 0x7fc00000 : rounded;
  const half_t half = __builtin_convertvector(result >> 16, half_t);
  __builtin_memcpy(target, &half, sizeof(half));
}

// out[j, i] = block[i, j] of a square of registers. Interleaving rows i and i + n / 2 moves a bit
// of the row index into the column index, so log2(n) rounds transpose. Only GCC has the shuffle.
#if defined(__GNUC__) && !defined(__clang__)
#define HIMO_TRANSPOSE_IN_REGISTERS
template <typename acc_t, typename out_t>
HIMO_INLINE void transpose_block(const acc_t* block, int64_t stride, out_t* out,
                                 int64_t out_stride) {
  using lanes_t = typename Lanes<acc_t>::type;
  constexpr int64_t n = Lanes<acc_t>::count;
  typename Lanes<acc_t>::bits low, high;
  for (int64_t k = 0; k < n; ++k) {
    low[k] = k / 2 + k % 2 * n;
    high[k] = low[k] + n / 2;
  }
  lanes_t rows[n];
#pragma GCC unroll 16
  for (int64_t i = 0; i < n; ++i) rows[i] = load<acc_t>(block + i * stride);
#pragma GCC unroll 4
  for (int64_t round = 1; round < n; round *= 2) {
    lanes_t next[n];
#pragma GCC unroll 8
    for (int64_t i = 0; i < n / 2; ++i) {
      next[2 * i] = __builtin_shuffle(rows[i], rows[i + n / 2], low);
      next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + n / 2], high);
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < n; ++i) rows[i] = next[i];
  }
#pragma GCC unroll 16
  for (int64_t i = 0; i < n; ++i) store_as(out + i * out_stride, rows[i]);
}
#endif

// In strips of rows that stay in L1 while they are read.
template <typename acc_t, typename out_t>
void transpose(const acc_t* tile, int64_t stride, int64_t rows, int64_t columns, out_t* out,
               int64_t out_stride) {
  constexpr int64_t kStrip = 16;
  for (int64_t i0 = 0; i0 < rows; i0 += kStrip) {
    const int64_t i1 = i0 + kStrip < rows ? i0 + kStrip : rows;
    int64_t j0 = 0;
#ifdef HIMO_TRANSPOSE_IN_REGISTERS
    constexpr int64_t n = Lanes<acc_t>::count;
    for (; i1 - i0 == kStrip && j0 + n <= columns; j0 += n) {
      for (int64_t i = i0; i < i1; i += n) {
        transpose_block(tile + i * stride + j0, stride, out + j0 * out_stride + i, out_stride);
      }
    }
#endif
    for (int64_t j = j0; j < columns; ++j) {
      for (int64_t i = i0; i < i1; ++i) {
        out[j * out_stride + i] = convert(tile[i * stride + j], static_cast<out_t*>(nullptr));
      }
    }
  }
}

void round_rows(const float* tile, int64_t stride, int64_t rows, int64_t columns, uint16_t* out,
                int64_t out_stride) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      out[i * out_stride + j] = convert(tile[i * stride + j], static_cast<uint16_t*>(nullptr));
    }
  }
}

}  // namespace

extern const TileLoops tile_loops;
const TileLoops tile_loops = {
    {statistics<float>, gradient<float>, sigmoid<float>, transpose<float, float>},
    {statistics<double>, gradient<double>, sigmoid<double>, transpose<double, double>},
    transpose<float, uint16_t>,
    round_rows,
};

}  // namespace himo::cpu::HIMO_ISA
