// The loops of pair_loops.h. Each loops_<instruction set>.cpp enables its instruction set and then
// includes this file, after tile_loops_body.h, whose functions it uses.

#include <cstdint>

#include "cpu/isa_lanes.h"
#include "cpu/pair_loops.h"

namespace himo::cpu::HIMO_ISA {
namespace {

template <typename acc_t>
HIMO_INLINE typename Lanes<acc_t>::bits load_integers(
    const typename LaneInteger<acc_t>::type* source) {
  typename Lanes<acc_t>::bits result;
  __builtin_memcpy(&result, source, sizeof(result));
  return result;
}

// The places first, first + 1, ... of one vector.
template <typename acc_t>
HIMO_INLINE typename Lanes<acc_t>::bits places(int64_t first) {
  typename Lanes<acc_t>::bits result;
  for (int64_t k = 0; k < Lanes<acc_t>::count; ++k) {
    result[k] = static_cast<typename LaneInteger<acc_t>::type>(first + k);
  }
  return result;
}

// One vector of a row of products, which are not padded.
template <typename acc_t>
HIMO_INLINE typename Lanes<acc_t>::type products_at(const PairTile<acc_t>& tile, int64_t i,
                                                    int64_t j) {
  const acc_t* products = tile.products + i * tile.products_stride + j;
  const int64_t count = tile.columns - j;
  return count >= Lanes<acc_t>::count ? load<acc_t>(products) : load_first<acc_t>(products, count);
}

// What row i of a tile has to do with one vector of its columns: masks of all bits or none.
template <typename acc_t>
struct Relation {
  using bits_t = typename Lanes<acc_t>::bits;
  using integer_t = typename LaneInteger<acc_t>::type;
  bits_t allowed;        // not excluded, and a column of the tile
  bits_t positive;       // set only if the tile has labels or targets
  bits_t row_single;     // the single positive of the row
  bits_t column_single;  // the row is the single positive of the column

  template <bool kBoth>
  static HIMO_INLINE Relation of(const PairTile<acc_t>& tile, int64_t i, int64_t j, bits_t place) {
    Relation pair;
    pair.allowed = place < static_cast<integer_t>(tile.column + tile.columns);
    pair.positive = bits_t{};
    if (tile.has_labels || tile.has_targets) {
      pair.positive = load_integers<acc_t>(tile.of_columns.keys + j) == tile.of_rows.keys[i];
    }
    if (tile.has_labels) {
      pair.allowed &= pair.positive |
                      (load_integers<acc_t>(tile.of_columns.labels + j) != tile.of_rows.labels[i]);
    }
    const auto row = static_cast<integer_t>(tile.row + i);
    if (tile.exclude_self) pair.allowed &= place != row;
    pair.row_single = place == tile.of_rows.single[i];
    pair.column_single = bits_t{};
    if (kBoth) pair.column_single = load_integers<acc_t>(tile.of_columns.single + j) == row;
    return pair;
  }
};

// (target [positive] + share) relative in the lanes to count: excluded pairs and a single positive
// give 0.
template <typename acc_t>
HIMO_INLINE typename Lanes<acc_t>::type targeted(typename Lanes<acc_t>::type relative,
                                                 typename Lanes<acc_t>::type target,
                                                 typename Lanes<acc_t>::type share,
                                                 typename Lanes<acc_t>::bits positive,
                                                 typename Lanes<acc_t>::bits counted) {
  using lanes_t = typename Lanes<acc_t>::type;
  const lanes_t value = relative * (share + (positive ? target : lanes_t{}));
  return counted ? value : lanes_t{};
}

// Writes the logits of a row, -inf where a pair is excluded. Updates the maxima and totals.
template <typename acc_t, bool kBoth>
HIMO_INLINE void prepare_row(const PairTile<acc_t>& tile, int64_t i) {
  using lanes_t = typename Lanes<acc_t>::type;
  constexpr int64_t step = Lanes<acc_t>::count;
  const auto &own = tile.of_rows, &others = tile.of_columns;
  const int64_t width = padded(tile.columns);
  acc_t* logits = tile.logits + i * width;
  const lanes_t reference = fill<acc_t>(own.reference[i]);
  const lanes_t target = fill<acc_t>(own.target[i]), share = fill<acc_t>(own.share[i]);
  lanes_t max = fill<acc_t>(own.max[i]), total_of_row{};
  auto place = places<acc_t>(tile.column);
  for (int64_t j = 0; j < width; j += step, place += step) {
    const auto pair = Relation<acc_t>::template of<kBoth>(tile, i, j, place);
    const lanes_t value = rounded_product<acc_t>(products_at<acc_t>(tile, i, j), tile.scale);
    const lanes_t logit = pair.allowed ? value : fill<acc_t>(-__builtin_inf());
    store<acc_t>(logits + j, logit);
    max = larger(logit - reference, max);
    if (tile.has_targets) {
      total_of_row += targeted<acc_t>(value - reference, target, share, pair.positive,
                                      pair.allowed & ~pair.row_single);
    }
    if (kBoth) {
      const lanes_t of_column = load<acc_t>(others.reference + j);
      store<acc_t>(others.max + j, larger(logit - of_column, load<acc_t>(others.max + j)));
      if (tile.has_targets) {
        const lanes_t more = targeted<acc_t>(value - of_column, load<acc_t>(others.target + j),
                                             load<acc_t>(others.share + j), pair.positive,
                                             pair.allowed & ~pair.column_single);
        store<acc_t>(others.total + j, load<acc_t>(others.total + j) + more);
      }
    }
  }
  own.total[i] += total<acc_t>(total_of_row);
  const acc_t old_max = own.max[i], new_max = largest<acc_t>(max);
  own.max[i] = new_max;
  if (new_max > old_max) own.sum[i] *= exponential<acc_t>(fill<acc_t>(old_max - new_max))[0];
}

template <typename acc_t, bool kBoth>
void pair_statistics(const PairTile<acc_t>& tile) {
  using lanes_t = typename Lanes<acc_t>::type;
  constexpr int64_t step = Lanes<acc_t>::count;
  const auto &own = tile.of_rows, &others = tile.of_columns;
  const int64_t width = padded(tile.columns);
  if (kBoth) {
    for (int64_t j = 0; j < width; j += step) {
      store<acc_t>(tile.column_old_max + j, load<acc_t>(others.max + j));
    }
  }
  for (int64_t i = 0; i < tile.rows; ++i) prepare_row<acc_t, kBoth>(tile, i);
  Ratios<acc_t> ratios;
  if (kBoth) {
    for (int64_t j = 0; j < width; j += step) {
      const lanes_t change = load<acc_t>(tile.column_old_max + j) - load<acc_t>(others.max + j);
      store<acc_t>(others.sum + j, load<acc_t>(others.sum + j) * exponential<acc_t>(change));
    }
    ratios = Ratios<acc_t>(tile.rows, tile.columns, own.reference, own.max, others.reference,
                           others.max);
  }
  acc_t sums[kTileColumns] = {};  // of exp(S - r_i - M_i) times its row's ratio
  for (int64_t i = 0; i < tile.rows; ++i) {
    const acc_t* logits = tile.logits + i * width;
    const lanes_t reference = fill<acc_t>(own.reference[i]), max = fill<acc_t>(own.max[i]);
    const auto row = static_cast<typename LaneInteger<acc_t>::type>(tile.row + i);
    lanes_t sum{};
    auto place = places<acc_t>(tile.column);
    for (int64_t j = 0; j < width; j += step, place += step) {
      const lanes_t logit = load<acc_t>(logits + j);
      const lanes_t power = exponential<acc_t>((logit - reference) - max);
      sum += place == own.single[i] ? lanes_t{} : power;
      if (kBoth) {
        lanes_t column = power * ratios.rows[i];
        if (!ratios.in_range) {
          column = exponential<acc_t>((logit - load<acc_t>(others.reference + j)) -
                                      load<acc_t>(others.max + j));
        }
        const auto single = load_integers<acc_t>(others.single + j) == row;
        store<acc_t>(sums + j, load<acc_t>(sums + j) + (single ? lanes_t{} : column));
      }
    }
    own.sum[i] += total<acc_t>(sum);
  }
  if (!kBoth) return;
  for (int64_t j = 0; j < width; j += step) {
    store<acc_t>(others.sum + j, load<acc_t>(others.sum + j) +
                                     load<acc_t>(sums + j) * load<acc_t>(ratios.columns + j));
  }
}

// P - target [positive] - share, and its value at a single positive.
template <typename acc_t>
HIMO_INLINE typename Lanes<acc_t>::type slope(typename Lanes<acc_t>::type power,
                                              typename Lanes<acc_t>::type target,
                                              typename Lanes<acc_t>::type share,
                                              typename Lanes<acc_t>::type of_single,
                                              typename Lanes<acc_t>::bits positive,
                                              typename Lanes<acc_t>::bits single) {
  using lanes_t = typename Lanes<acc_t>::type;
  const lanes_t value = power - share - (positive ? target : lanes_t{});
  return single ? of_single : value;
}

template <typename acc_t, bool kBoth>
double pair_gradient(const PairTile<acc_t>& tile) {
  using lanes_t = typename Lanes<acc_t>::type;
  constexpr int64_t step = Lanes<acc_t>::count;
  const auto &own = tile.of_rows, &others = tile.of_columns;
  const int64_t width = padded(tile.columns);
  Ratios<acc_t> ratios;
  if (kBoth) {
    ratios = Ratios<acc_t>(tile.rows, tile.columns, own.reference, own.log, others.reference,
                           others.log);
  }
  double grad_scale = 0;
  for (int64_t i = 0; i < tile.rows; ++i) {
    acc_t* part = tile.part + i * width;
    const lanes_t reference = fill<acc_t>(own.reference[i]), log = fill<acc_t>(own.log[i]);
    const lanes_t target = fill<acc_t>(own.target[i]), share = fill<acc_t>(own.share[i]);
    const lanes_t of_single = fill<acc_t>(own.of_single[i]);
    lanes_t sum{};
    auto place = places<acc_t>(tile.column);
    for (int64_t j = 0; j < width; j += step, place += step) {
      const auto pair = Relation<acc_t>::template of<kBoth>(tile, i, j, place);
      const lanes_t product = products_at<acc_t>(tile, i, j);
      const lanes_t logit = rounded_product<acc_t>(product, tile.scale);
      const lanes_t power = exponential<acc_t>((logit - reference) - log);
      lanes_t grad = slope<acc_t>(power, target, share, of_single, pair.positive, pair.row_single) *
                     own.weight[i];
      if (kBoth) {
        lanes_t column = power * ratios.rows[i] * load<acc_t>(ratios.columns + j);
        if (!ratios.in_range) {
          column = exponential<acc_t>((logit - load<acc_t>(others.reference + j)) -
                                      load<acc_t>(others.log + j));
        }
        grad += slope<acc_t>(column, load<acc_t>(others.target + j), load<acc_t>(others.share + j),
                             load<acc_t>(others.of_single + j), pair.positive, pair.column_single) *
                load<acc_t>(others.weight + j);
      }
      sum += pair.allowed ? grad * product : lanes_t{};
      store<acc_t>(part + j, pair.allowed ? grad * tile.factor : lanes_t{});
    }
    grad_scale += static_cast<double>(total<acc_t>(sum));
  }
  return grad_scale;
}

template <typename acc_t>
constexpr PairLoops<acc_t> kPairLoops = {pair_statistics<acc_t, true>,
                                         pair_statistics<acc_t, false>, pair_gradient<acc_t, true>,
                                         pair_gradient<acc_t, false>};

}  // namespace

extern const AllPairLoops pair_loops;
const AllPairLoops pair_loops = {kPairLoops<float>, kPairLoops<double>};

}  // namespace himo::cpu::HIMO_ISA
