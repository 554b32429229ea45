// Loops over one contiguous row: L2 normalisation and its gradient, and products. Compiled for the
// same instruction sets, and selected in the same way, as tile_loops.h.
#pragma once

#include <cstdint>

#include "cpu/tile_loops.h"

namespace himo::cpu {

// The bits of 16-bit numbers. c10's types would instantiate inline conversions here, which the
// linker could share with files compiled for another instruction set.
struct BFloat16Bits {
  uint16_t bits;
};
struct HalfBits {
  uint16_t bits;
};

template <typename element_t>
struct SumsOf {
  using type = float;
};
template <>
struct SumsOf<double> {
  using type = double;
};

// Sums are float, or double for double. A zero row gives zeros and a zero gradient. A row with NaN
// or inf gives NaN in every entry.
template <typename element_t>
struct RowLoops {
  // normalized = x / |x|
  void (*normalize)(const element_t* x, int64_t size, element_t* normalized);
  // grad_x = (grad - y (grad . y)) / |x|, y = x / |x|
  void (*normalize_gradient)(const element_t* grad, const element_t* x, int64_t size,
                             element_t* grad_x);
  // x . y
  typename SumsOf<element_t>::type (*product)(const element_t* x, const element_t* y, int64_t size);
};

struct RowLoopsOfEach {
  RowLoops<float> float32;
  RowLoops<double> float64;
  RowLoops<BFloat16Bits> bfloat16;
  RowLoops<HalfBits> float16;
};

// Returns the loops for this machine.
const RowLoopsOfEach& row_loops();

namespace default_isa {
extern const RowLoopsOfEach row_loops;
}
#ifdef HIMO_X86_TILE_LOOPS
namespace avx2 {
extern const RowLoopsOfEach row_loops;
}
namespace avx512 {
extern const RowLoopsOfEach row_loops;
}
#endif

}  // namespace himo::cpu
