// One vector register of the instruction set that the including file is compiled for.
//
// The loops in tile_loops_body.h and row_loops_body.h are compiled once per instruction set, in
// loops_<instruction set>.cpp. Nothing here may instantiate a standard library template: the
// linker could pick that copy, built for the wrong instruction set, for other files.
#pragma once

#include <cstdint>

#if !defined(HIMO_ISA) || !defined(HIMO_VECTOR_BYTES)
#error "define HIMO_ISA, the namespace of the instruction set, and HIMO_VECTOR_BYTES, its width"
#endif

namespace himo::cpu::HIMO_ISA {
namespace {

// A register of acc_t, and one of integers of the same width.
template <typename acc_t>
struct Lanes;
template <>
struct Lanes<float> {
  using type = float __attribute__((vector_size(HIMO_VECTOR_BYTES)));
  using bits = int32_t __attribute__((vector_size(HIMO_VECTOR_BYTES)));
  using unaligned = float __attribute__((vector_size(HIMO_VECTOR_BYTES), aligned(4)));
  static constexpr int64_t count = HIMO_VECTOR_BYTES / 4;
};
template <>
struct Lanes<double> {
  using type = double __attribute__((vector_size(HIMO_VECTOR_BYTES)));
  using bits = int64_t __attribute__((vector_size(HIMO_VECTOR_BYTES)));
  using unaligned = double __attribute__((vector_size(HIMO_VECTOR_BYTES), aligned(8)));
  static constexpr int64_t count = HIMO_VECTOR_BYTES / 8;
};

#define HIMO_INLINE inline __attribute__((always_inline))

template <typename acc_t>
HIMO_INLINE typename Lanes<acc_t>::type load(const acc_t* source) {
  return *reinterpret_cast<const typename Lanes<acc_t>::unaligned*>(source);
}

// Loads the first `count` values only, and 0 for the others.
template <typename acc_t>
HIMO_INLINE typename Lanes<acc_t>::type load_first(const acc_t* source, int64_t count) {
  typename Lanes<acc_t>::type result{};
  for (int64_t k = 0; k < Lanes<acc_t>::count; ++k) {
    if (k < count) result[k] = source[k];
  }
  return result;
}

template <typename acc_t>
HIMO_INLINE void store(acc_t* target, typename Lanes<acc_t>::type value) {
  *reinterpret_cast<typename Lanes<acc_t>::unaligned*>(target) = value;
}

template <typename acc_t>
HIMO_INLINE typename Lanes<acc_t>::type fill(acc_t value) {
  return value - typename Lanes<acc_t>::type{};  // x - 0 = x, also for -0 and NaN
}

// Returns the larger of the two, and b if a is NaN: the caller must propagate NaN itself.
template <typename lanes_t>
HIMO_INLINE lanes_t larger(lanes_t a, lanes_t b) {
  return a > b ? a : b;
}

template <typename acc_t>
HIMO_INLINE acc_t largest(typename Lanes<acc_t>::type value) {
  acc_t result = value[0];
  for (int64_t k = 1; k < Lanes<acc_t>::count; ++k) result = value[k] > result ? value[k] : result;
  return result;
}

// Adds halves: log2(count) dependent additions.
template <typename acc_t>
HIMO_INLINE acc_t total(typename Lanes<acc_t>::type value) {
  acc_t sums[Lanes<acc_t>::count];
  store(sums, value);
  for (int64_t half = Lanes<acc_t>::count / 2; half > 0; half /= 2) {
    for (int64_t k = 0; k < half; ++k) sums[k] += sums[k + half];
  }
  return sums[0];
}

}  // namespace
}  // namespace himo::cpu::HIMO_ISA
