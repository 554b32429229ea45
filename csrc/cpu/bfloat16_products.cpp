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
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512bf16"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512bf16")
#endif

namespace himo::cpu::avx512_bf16 {
namespace {

// Rows of a register tile: 8 x 2 sums hide the latency of vdpbf16ps and leave registers for a row
// of the panel and the broadcast pair.
constexpr int kRows = 8;

// Meanwhile fetches `pairs` times `ahead_step` bytes from `ahead` on into L2.
template <int rows>
void multiply_strip(const uint16_t* left, int64_t left_stride, const uint16_t* panel, int64_t pairs,
                    __mmask16 low_mask, __mmask16 high_mask, bool add, float* product,
                    int64_t product_stride, const char* ahead, int64_t ahead_step) {
  __m512 low[rows], high[rows];
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
    float* row = product + i * product_stride;
    low[i] = add ? _mm512_maskz_loadu_ps(low_mask, row) : _mm512_setzero_ps();
    high[i] = add ? _mm512_maskz_loadu_ps(high_mask, row + 16) : _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < pairs; ++k, ahead += ahead_step) {
    _mm_prefetch(ahead, _MM_HINT_T1);
    const auto low_pairs = (__m512bh)_mm512_loadu_si512(panel + k * 2 * kPanel);
    const auto high_pairs = (__m512bh)_mm512_loadu_si512(panel + k * 2 * kPanel + kPanel);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      int32_t pair;
      __builtin_memcpy(&pair, left + i * left_stride + 2 * k, sizeof(pair));
      const auto broadcast = (__m512bh)_mm512_set1_epi32(pair);
      low[i] = _mm512_dpbf16_ps(low[i], broadcast, low_pairs);
      high[i] = _mm512_dpbf16_ps(high[i], broadcast, high_pairs);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
    float* row = product + i * product_stride;
    _mm512_mask_storeu_ps(row, low_mask, low[i]);
    _mm512_mask_storeu_ps(row + 16, high_mask, high[i]);
  }
}

constexpr decltype(&multiply_strip<1>) kStrips[kRows] = {
    multiply_strip<1>, multiply_strip<2>, multiply_strip<3>, multiply_strip<4>,
    multiply_strip<5>, multiply_strip<6>, multiply_strip<7>, multiply_strip<8>,
};

__mmask16 first_lanes(int64_t count) {
  return count >= 16 ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1 << count) - 1);
}

}  // namespace

void multiply(const uint16_t* left, int64_t left_stride, int64_t rows, const uint16_t* panels,
              int64_t panel_stride, int64_t pairs, int64_t columns, bool add, float* product,
              int64_t product_stride) {
  // A panel stays in L2 for all strips, but comes from L3. Each strip fetches a part of the next.
  const int64_t strips = (rows + kRows - 1) / kRows, step = kPanel * 4 / strips;
  for (int64_t column = 0; column < columns; column += kPanel, panels += panel_stride) {
    const __mmask16 low_mask = first_lanes(columns - column);
    const __mmask16 high_mask = first_lanes(columns - column - 16);
    const char* ahead = reinterpret_cast<const char*>(panels + panel_stride);
    for (int64_t i = 0; i < rows; i += kRows, ahead += pairs * step) {
      kStrips[(rows - i < kRows ? rows - i : kRows) - 1](
          left + i * left_stride, left_stride, panels, pairs, low_mask, high_mask, add,
          product + i * product_stride + column, product_stride, ahead, step);
    }
  }
}

void interleave_rows(const uint16_t* from, int64_t row_stride, int64_t rows, int64_t columns,
                     uint16_t* panel) {
  // Lane k of a result is lane k / 2 of the first row, or of the second (+ 32) if k is odd.
  uint16_t first_half[32], second_half[32];
  for (int k = 0; k < 32; ++k) {
    first_half[k] = static_cast<uint16_t>(k / 2 + k % 2 * 32);
    second_half[k] = static_cast<uint16_t>(first_half[k] + 16);
  }
  const __m512i first = _mm512_loadu_si512(first_half), second = _mm512_loadu_si512(second_half);
  const auto mask = static_cast<__mmask32>((int64_t{1} << columns) - 1);
  for (int64_t row = 0; row < rows; row += 2, from += 2 * row_stride, panel += 2 * kPanel) {
    const __m512i upper = _mm512_maskz_loadu_epi16(mask, from);
    const __m512i lower =
        row + 1 < rows ? _mm512_maskz_loadu_epi16(mask, from + row_stride) : _mm512_setzero_si512();
    _mm512_storeu_si512(panel, _mm512_permutex2var_epi16(upper, first, lower));
    _mm512_storeu_si512(panel + kPanel, _mm512_permutex2var_epi16(upper, second, lower));
  }
}

}  // namespace himo::cpu::avx512_bf16
#ifdef HIMO_BF16
#pragma clang attribute pop
#endif
#pragma GCC diagnostic pop
#endif
