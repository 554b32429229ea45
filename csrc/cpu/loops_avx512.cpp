// tile_loops.h, pair_loops.h, row_loops.h and solver_loops.h for AVX-512.
#include "cpu/pair_loops.h"
#include "cpu/row_loops.h"
#include "cpu/solver_loops.h"
#include "cpu/tile_loops.h"

#ifdef HIMO_X86_TILE_LOOPS
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#endif
#define HIMO_ISA avx512
#define HIMO_VECTOR_BYTES 64
#include "cpu/row_loops_body.h"
#include "cpu/solver_loops_body.h"
#include "cpu/tile_loops_body.h"
// After the loops above, whose functions it uses.
#include "cpu/pair_loops_body.h"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
