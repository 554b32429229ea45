// Products of bfloat16 tiles with AVX-512 BF16, whose vdpbf16ps adds two products of bfloat16 to a
// float. Used on processors without AMX: oneDNN's micro-kernel for bfloat16 needs AMX, and its
// products of whole matrices round their results to bfloat16, which is too inaccurate for logits.
#include <cstdint>

#include "cpu/tile_products.h"

#if defined(__x86_64__) && defined(__GNUC__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored \
    "-Wmaybe-uninitialized"  // false positive: the intrinsics use undefined registers
#include <immintrin.h>

#ifdef __clang__
#define HIMO_BF16
#pragma clang attribute push(__attribute__((target("avx512f,avx512bf16"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bf16")
#endif

namespace himo::cpu::avx512_bf16 {
namespace {

// Rows of a register tile: 8 x 2 sums hide the latency of vdpbf16ps and leave registers for a row
// of the panel and the broadcast pair.
constexpr int kRows = 8;

template <int rows>
void multiply_strip(const uint16_t* left, int64_t left_stride, const uint16_t* panel, int64_t pairs,
                    __mmask16 low_mask, __mmask16 high_mask, bool add, float* product,
                    int64_t product_stride) {
  __m512 low[rows], high[rows];
  for (int i = 0; i < rows; ++i) {
    float* row = product + i * product_stride;
    low[i] = add ? _mm512_maskz_loadu_ps(low_mask, row) : _mm512_setzero_ps();
    high[i] = add ? _mm512_maskz_loadu_ps(high_mask, row + 16) : _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < pairs; ++k) {
    const auto low_pairs = (__m512bh)_mm512_loadu_si512(panel + k * 2 * kPanel);
    const auto high_pairs = (__m512bh)_mm512_loadu_si512(panel + k * 2 * kPanel + kPanel);
    for (int i = 0; i < rows; ++i) {
      int32_t pair;
      __builtin_memcpy(&pair, left + i * left_stride + 2 * k, sizeof(pair));
      const auto broadcast = (__m512bh)_mm512_set1_epi32(pair);
      low[i] = _mm512_dpbf16_ps(low[i], broadcast, low_pairs);
      high[i] = _mm512_dpbf16_ps(high[i], broadcast, high_pairs);
    }
  }
  for (int i = 0; i < rows; ++i) {
    float* row = product + i * product_stride;
    _mm512_mask_storeu_ps(row, low_mask, low[i]);
    _mm512_mask_storeu_ps(row + 16, high_mask, high[i]);
  }
}

__mmask16 first_lanes(int64_t count) {
  return count >= 16 ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1 << count) - 1);
}

}  // namespace

void multiply(const uint16_t* left, int64_t left_stride, int64_t rows, const uint16_t* panels,
              int64_t panel_stride, int64_t pairs, int64_t columns, bool add, float* product,
              int64_t product_stride) {
  for (int64_t column = 0; column < columns; column += kPanel, panels += panel_stride) {
    const __mmask16 low_mask = first_lanes(columns - column);
    const __mmask16 high_mask = first_lanes(columns - column - 16);
    int64_t i = 0;
    for (; i + kRows <= rows; i += kRows) {
      multiply_strip<kRows>(left + i * left_stride, left_stride, panels, pairs, low_mask, high_mask,
                            add, product + i * product_stride + column, product_stride);
    }
    for (; i < rows; ++i) {
      multiply_strip<1>(left + i * left_stride, left_stride, panels, pairs, low_mask, high_mask,
                        add, product + i * product_stride + column, product_stride);
    }
  }
}

}  // namespace himo::cpu::avx512_bf16
#ifdef HIMO_BF16
#pragma clang attribute pop
#endif
#pragma GCC diagnostic pop
#endif
