// Products of tiles by one thread, accumulated in float (of float or bfloat16 factors) or double.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/util/BFloat16.h>

#include <type_traits>

namespace himo::cpu {

template <typename factor_t>
using accumulator_t = std::conditional_t<std::is_same_v<factor_t, double>, double, float>;

// Returns whether this machine multiplies bfloat16 (AVX-512 BF16) and ATen's CPU capability admits
// it. Without it, bfloat16 features are raised to float.
bool multiplies_bfloat16();

// Returns the matrix [M, K] as a left factor: rows contiguous, of even length for bfloat16, which
// is multiplied in pairs (0 in the last column).
template <typename factor_t>
at::Tensor left_factor(const at::Tensor& matrix);

// A matrix [K, N] laid out as a right factor: of float by rows, or panels of 256 columns by rows;
// of bfloat16 panels of 32, in which two rows are interleaved; of double by rows. Copies only where
// the layout differs.
template <typename factor_t>
class RightFactor {
 public:
  static constexpr int64_t kColumns = 256;  // products are taken this many columns at a time

  RightFactor() = default;
  explicit RightFactor(const at::Tensor& matrix);  // [K, N]

  // product = left block, or += if add, with block the rows [row, row + inner) and columns [column,
  // column + columns) of this matrix. row is even, column a multiple of 32 and the block inside one
  // panel of 256 columns, or from the first column of one on.
  void multiply(const factor_t* left, int64_t left_stride, int64_t rows, int64_t row, int64_t inner,
                int64_t column, int64_t columns, bool add, accumulator_t<factor_t>* product,
                int64_t product_stride) const;

 private:
  at::Tensor storage_;
  int64_t panel_stride_ = 0, row_stride_ = 0;  // elements, of float
};

// What a thread may hold between products, matrix registers (AMX) among it, is given back at the
// end of a scope of them, and by release() before other code runs inside one: that configures those
// anew or gives them back itself, and the next product, of either, would be wrong or trap.
struct ProductScope {
  ProductScope() = default;
  ProductScope(const ProductScope&) = delete;
  ProductScope& operator=(const ProductScope&) = delete;
  ~ProductScope() { release(); }
  static void release();
};

namespace avx512_bf16 {
constexpr int64_t kPanel = 32;  // columns of a panel: two registers of float

// product [rows, columns] = left [rows, 2 * pairs] times panels [pairs, 32, 2], panel_stride
// elements apart; columns past a multiple of 32 are computed from the panel and not stored.
void multiply(const uint16_t* left, int64_t left_stride, int64_t rows, const uint16_t* panels,
              int64_t panel_stride, int64_t pairs, int64_t columns, bool add, float* product,
              int64_t product_stride);
}  // namespace avx512_bf16

}  // namespace himo::cpu
