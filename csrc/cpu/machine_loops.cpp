// Selects the loops of tile_loops.h, pair_loops.h, row_loops.h and solver_loops.h for this machine.

#include <ATen/Version.h>

#include "cpu/pair_loops.h"
#include "cpu/row_loops.h"
#include "cpu/solver_loops.h"
#include "cpu/tile_loops.h"

namespace himo::cpu {
namespace {

template <typename loops_t>
const loops_t& for_this_machine(const loops_t& portable, const loops_t& avx2,
                                const loops_t& avx512) {
  const auto capability = at::get_cpu_capability();
  if (capability == "AVX512") return avx512;
  return capability == "AVX2" ? avx2 : portable;
}

}  // namespace

const TileLoops& tile_loops() {
  static const TileLoops& loops =
      for_this_machine(default_isa::tile_loops, avx2::tile_loops, avx512::tile_loops);
  return loops;
}

const AllPairLoops& pair_loops() {
  static const AllPairLoops& loops =
      for_this_machine(default_isa::pair_loops, avx2::pair_loops, avx512::pair_loops);
  return loops;
}

const RowLoopsOfEach& row_loops() {
  static const RowLoopsOfEach& loops =
      for_this_machine(default_isa::row_loops, avx2::row_loops, avx512::row_loops);
  return loops;
}

const SolverLoops& solver_loops() {
  static const SolverLoops& loops =
      for_this_machine(default_isa::solver_loops, avx2::solver_loops, avx512::solver_loops);
  return loops;
}

}  // namespace himo::cpu
