// One AVX-512 register of float64. Functions marked HIMO_AVX512 are compiled for AVX-512 even in a
// file that is not.
#pragma once

#include <cstdint>

#if defined(__x86_64__) && defined(__GNUC__)
#define HIMO_WIDE_PRODUCTS
#define HIMO_AVX512 __attribute__((target("avx512f")))
#else
#define HIMO_AVX512
#endif
#define HIMO_AVX512_INLINE HIMO_AVX512 inline __attribute__((always_inline))

namespace himo::cpu {

using Lanes = double __attribute__((vector_size(64)));
constexpr int64_t kLaneCount = 8;

HIMO_AVX512_INLINE Lanes load(const double* source) {
  using unaligned_t __attribute__((vector_size(64), aligned(8))) = double;
  return *reinterpret_cast<const unaligned_t*>(source);
}

HIMO_AVX512_INLINE void store(double* target, Lanes value) {
  using unaligned_t __attribute__((vector_size(64), aligned(8))) = double;
  *reinterpret_cast<unaligned_t*>(target) = value;
}

HIMO_AVX512_INLINE double total(Lanes value) {
  double pairs[kLaneCount / 2];
  for (int k = 0; k < 4; ++k) pairs[k] = value[k] + value[k + 4];
  return (pairs[0] + pairs[2]) + (pairs[1] + pairs[3]);
}

constexpr int64_t round_down(int64_t i) { return i / kLaneCount * kLaneCount; }
constexpr int64_t round_up(int64_t i) { return round_down(i + kLaneCount - 1); }

}  // namespace himo::cpu
