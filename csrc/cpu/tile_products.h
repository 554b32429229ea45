// Single-threaded matrix products of tiles. Accumulates in float for float and bfloat16 factors,
// in double for double.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/util/BFloat16.h>

#include <type_traits>

namespace himo::cpu {

template <typename factor_t>
using accumulator_t = std::conditional_t<std::is_same_v<factor_t, double>, double, float>;

// Returns whether this machine multiplies bfloat16 (AVX-512 BF16) and ATen's CPU capability allows
// it. Otherwise bfloat16 features are converted to float.
bool multiplies_bfloat16();

// Returns the matrix [M, K] as a left factor with contiguous rows. bfloat16 is multiplied in pairs:
// odd rows are padded with one 0.
template <typename factor_t>
at::Tensor left_factor(const at::Tensor& matrix);

// A matrix [K, N] laid out as a right factor. float: row-major, or panels of a few columns, each
// row-major. bfloat16: panels of 32 columns with pairs of rows interleaved (VNNI). double:
// row-major. Copies only if the layout differs.
template <typename factor_t>
class RightFactor {
 public:
  static constexpr int64_t kColumns = 256;  // of a tile, a multiple of every panel's width

  RightFactor() = default;
  explicit RightFactor(const at::Tensor& matrix);  // [K, N]

  // product = left block, or += if add, where block is rows [row, row + inner) and columns [column,
  // column + columns) of this matrix. row must be even and column a multiple of 32.
  void multiply(const factor_t* left, int64_t left_stride, int64_t rows, int64_t row, int64_t inner,
                int64_t column, int64_t columns, bool add, accumulator_t<factor_t>* product,
                int64_t product_stride) const;

 private:
  at::Tensor storage_;
  int64_t width_ = 0, panel_stride_ = 0, row_stride_ = 0;  // of panels, in elements; float only
};

// Releases the AMX tile state of this thread when the scope ends. Call release() before other code
// runs inside a scope: that code may configure or release the tiles itself, and the next product
// would then be wrong or trap.
struct ProductScope {
  ProductScope() = default;
  ProductScope(const ProductScope&) = delete;
  ProductScope& operator=(const ProductScope&) = delete;
  ~ProductScope() { release(); }
  static void release();
};

namespace avx512_bf16 {
constexpr int64_t kPanel = 32;  // columns of a panel: two registers of float

// product [rows, columns] = left [rows, 2 * pairs] times panels [pairs, 32, 2], which are
// panel_stride elements apart. The last panel is multiplied in full; columns past `columns` are not
// stored.
void multiply(const uint16_t* left, int64_t left_stride, int64_t rows, const uint16_t* panels,
              int64_t panel_stride, int64_t pairs, int64_t columns, bool add, float* product,
              int64_t product_stride);

// Lays out rows [rows, columns <= 32] as a part of a panel, [ceil(rows / 2), 32, 2]: pairs of rows
// interleaved, with zeros past the last row and column.
void interleave_rows(const uint16_t* from, int64_t row_stride, int64_t rows, int64_t columns,
                     uint16_t* panel);
}  // namespace avx512_bf16

}  // namespace himo::cpu
