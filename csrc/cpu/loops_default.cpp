// tile_loops.h, pair_loops.h, row_loops.h and solver_loops.h for the instruction set that the
// compiler targets by default.
#define HIMO_ISA default_isa
#define HIMO_VECTOR_BYTES 16
#include "cpu/row_loops_body.h"
#include "cpu/solver_loops_body.h"
#include "cpu/tile_loops_body.h"
// After the loops above, whose functions it uses.
#include "cpu/pair_loops_body.h"
