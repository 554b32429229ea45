// Element-wise loops over one tile of products v_i . u_j: running softmax statistics, the gradient
// of the logits, and the sigmoid loss with its gradient. Compiled for AVX-512, AVX2 and the
// compiler's default; ATen's CPU capability selects one at run time (ATEN_CPU_CAPABILITY can lower
// it).
//
// acc_t is float or double. Arrays over the columns of a tile are read and written up to the next
// multiple of kTilePadding, so the caller must allocate that much.
#pragma once

#include <cstdint>

namespace himo::cpu {

// The largest tile: a block of rows (192 KiB of float at K = 768), the tile (64 KiB) and its
// gradient fit L2 together.
constexpr int64_t kTileRows = 64, kTileColumns = 256;
constexpr int64_t kTilePadding = 16;  // floats in the widest vector, 64 bytes

constexpr int64_t padded(int64_t size) {
  return (size + kTilePadding - 1) / kTilePadding * kTilePadding;
}

// Updates the running statistics of both directions in place. Row i, over all columns j but its
// positive: the maximum M_i of 0 and S_ij - p_i, and sum_j exp(S_ij - p_i - M_i). Columns likewise.
template <typename acc_t>
struct StatisticsTile {
  const acc_t* products;  // [rows, products_stride]
  int64_t products_stride;
  acc_t* logits;  // [rows, padded(columns)], scratch
  int64_t rows, columns;
  int64_t diagonal;  // column of the first row's positive; may lie outside the tile
  acc_t scale;
  const acc_t* row_positives;     // [rows]
  const acc_t* column_positives;  // [padded(columns)]
  acc_t* row_max;                 // [rows]
  acc_t* row_sum;                 // [rows]
  acc_t* column_max;              // [padded(columns)]
  acc_t* column_sum;              // [padded(columns)]
  acc_t* column_old_max;          // [padded(columns)], scratch
};

// factor * dL/dS of the tile. The row part is factor row_weight (P - (1 - smoothing) I - share);
// the column part is the same with the softmax over columns. If column_part is null, row_part
// receives the sum of both.
template <typename acc_t>
struct GradientTile {
  const acc_t* products;  // [rows, products_stride]
  int64_t products_stride;
  int64_t rows, columns;
  int64_t diagonal;
  acc_t scale, factor, smoothing;
  acc_t share;                    // smoothing / N
  const acc_t* row_positives;     // [rows]
  const acc_t* row_nll;           // [rows]
  const acc_t* row_weight;        // [rows]
  const acc_t* column_positives;  // [padded(columns)]
  const acc_t* column_nll;        // [padded(columns)]
  const acc_t* column_weight;     // [padded(columns)]
  acc_t* row_part;                // [rows, padded(columns)]; zero-padded
  acc_t* column_part;             // [rows, padded(columns)] or null; zero-padded
};

// The sigmoid loss: logits l = scale v_i . u_j + bias, sum of log(1 + exp(-z l)), with z = 1 at the
// positives and -1 elsewhere.
template <typename acc_t>
struct SigmoidTile {
  const acc_t* products;  // [rows, products_stride]
  int64_t products_stride;
  int64_t rows, columns;
  int64_t diagonal;
  acc_t scale, bias, factor;
  acc_t* part;  // [rows, padded(columns)]: factor dL/dl, zero-padded; null: no gradient
};

// Sums over a tile: of the loss, of dL/dl_ij v_i . u_j, and of dL/dl_ij. The last two are 0 without
// a gradient.
struct SigmoidSums {
  double loss = 0, scale = 0, bias = 0;

  SigmoidSums& operator+=(const SigmoidSums& other) {
    loss += other.loss;
    scale += other.scale;
    bias += other.bias;
    return *this;
  }
};

template <typename acc_t>
struct Loops {
  void (*statistics)(const StatisticsTile<acc_t>&);
  double (*gradient)(const GradientTile<acc_t>&);  // returns sum dL/dS_ij v_i . u_j
  SigmoidSums (*sigmoid)(const SigmoidTile<acc_t>&);
  // out[j, i] = tile[i, j]
  void (*transpose)(const acc_t* tile, int64_t stride, int64_t rows, int64_t columns, acc_t* out,
                    int64_t out_stride);
};

struct TileLoops {
  Loops<float> float32;
  Loops<double> float64;
  // Both round to nearest bfloat16: out[j, i] = tile[i, j] and out[i, j] = tile[i, j].
  void (*transpose_bfloat16)(const float* tile, int64_t stride, int64_t rows, int64_t columns,
                             uint16_t* out, int64_t out_stride);
  void (*round_bfloat16)(const float* tile, int64_t stride, int64_t rows, int64_t columns,
                         uint16_t* out, int64_t out_stride);
};

// Returns the loops for this machine.
const TileLoops& tile_loops();

namespace default_isa {
extern const TileLoops tile_loops;
}
#if defined(__x86_64__) && defined(__GNUC__)
#define HIMO_X86_TILE_LOOPS
namespace avx2 {
extern const TileLoops tile_loops;
}
namespace avx512 {
extern const TileLoops tile_loops;
}
#else
namespace avx2 = default_isa;
namespace avx512 = default_isa;
#endif

}  // namespace himo::cpu
