// tile_loops.h for the instruction set that the compiler targets by default.
#define HIMO_ISA default_isa
#define HIMO_VECTOR_BYTES 16
#include "cpu/tile_loops_body.h"
