// Element-wise loops over one tile of products x_i . y_j, where any pairs may be positive and any
// excluded: running softmax statistics, and the gradient of the logits. Like tile_loops.h, but for
// the forms of InfoNCE other than the square one.
#pragma once

#include <cstdint>

#include "cpu/tile_loops.h"

namespace himo::cpu {

// An integer as wide as acc_t, so that a comparison of integers selects numbers.
template <typename acc_t>
struct LaneInteger;
template <>
struct LaneInteger<float> {
  using type = int32_t;
};
template <>
struct LaneInteger<double> {
  using type = int64_t;
};

// The rows of a tile, or its columns. Arrays over columns are padded.
template <typename acc_t>
struct PairSide {
  using integer_t = typename LaneInteger<acc_t>::type;
  // A pair of equal keys is positive. Otherwise a pair of equal labels, if there are labels, is
  // excluded. single is the only positive of a row (column), counted over the whole batch; or -1.
  const integer_t *keys, *labels, *single;
  const acc_t *reference, *target, *share;
  // Forward, all relative to the reference, and with log = max + log(sum): the maximum over all
  // that is not excluded, the sum of exp over the same without a single positive, and the sum of
  // (target [positive] + share) (S - reference) over the same again. Updated in place.
  acc_t *max, *sum, *total;
  // Backward: the log of all exponentials, dL/d of each loss, and dL/dS of a single positive.
  const acc_t *log, *weight, *of_single;
};

template <typename acc_t>
struct PairTile {
  const acc_t* products;  // [rows, products_stride]
  int64_t products_stride;
  int64_t row, rows, column, columns;  // the first row and column count over the whole batch
  acc_t scale;
  bool has_labels, exclude_self;  // exclude_self: the pair (i, i) is excluded in any case
  bool has_targets;  // forward: total is wanted; backward: a row or column has several positives
  PairSide<acc_t> of_rows, of_columns;
  // Forward: scratch [rows, padded(columns)] and [padded(columns)].
  acc_t *logits, *column_old_max;
  // Backward: factor dL/dS [rows, padded(columns)], zero-padded.
  acc_t factor;
  acc_t* part;
};

template <typename acc_t>
struct PairLoops {
  // Of rows and columns, or of the rows only.
  void (*statistics)(const PairTile<acc_t>&);
  void (*row_statistics)(const PairTile<acc_t>&);
  // Both return sum dL/dS_ij x_i . y_j.
  double (*gradient)(const PairTile<acc_t>&);
  double (*row_gradient)(const PairTile<acc_t>&);
};

struct AllPairLoops {
  PairLoops<float> float32;
  PairLoops<double> float64;
};

// Returns the loops for this machine.
const AllPairLoops& pair_loops();

namespace default_isa {
extern const AllPairLoops pair_loops;
}
#ifdef HIMO_X86_TILE_LOOPS
namespace avx2 {
extern const AllPairLoops pair_loops;
}
namespace avx512 {
extern const AllPairLoops pair_loops;
}
#endif

}  // namespace himo::cpu
