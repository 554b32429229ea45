// Inner loops of the symmetric eigensolver (symmetric_eigen.h). Compiled for the same instruction
// sets, and selected in the same way, as tile_loops.h.
//
// Vectors start at a multiple of kLanePadding entries and are read and written in whole multiples.
#pragma once

#include <cstdint>

#include "cpu/tile_loops.h"

namespace himo::cpu {

constexpr int64_t kLanePadding = 8;  // doubles in the widest vector, 64 bytes

constexpr int64_t round_down(int64_t i) { return i / kLanePadding * kLanePadding; }
constexpr int64_t round_up(int64_t i) { return round_down(i + kLanePadding - 1); }

// Arguments of one pass over V and W that subtracts combinations of their rows from two rows.
struct Pass {
  const double *v, *w;  // [count, stride]
  int64_t stride, count;
  const double *v_of_product, *w_of_product;  // coefficients, [count]
  const double *v_of_next, *w_of_next;
  double *product, *next;
};

// diag(d) + rho z z^T, see secular.h.
struct Secular {
  int64_t count;
  double rho;             // > 0
  const double *d, *z;    // [round_up(count)]
  const int64_t* sorted;  // [count]; d[sorted[i]] ascends
};

// f(x) = 1 / rho + sum_j z_j^2 / (d_j - x) at some x without its first term: the sums over the
// poles below and above x, and their derivatives.
struct SecularSums {
  double below, above, below_slope, above_slope;
};

struct SolverLoops {
  // Returns the largest magnitude.
  double (*largest)(const double* values, int64_t count);
  // Return and add, over [from, width).
  double (*dot)(const double* a, const double* b, int64_t from, int64_t width);
  void (*add)(double* out, const double* x, int64_t from, int64_t width);
  // out = a out + b x
  void (*combine)(double a, double* out, double b, const double* x, int64_t from, int64_t width);
  // out[r] = rows[r] . x over [from, width), for 4 rows
  void (*dot_rows)(const double* rows, int64_t stride, int64_t from, int64_t width, const double* x,
                   double* out);
  // out += A x, restricted to rows `from` to `to` of the upper half of A and their mirror image.
  // Columns left of `from` are not read. `from` and `to` are multiples of kLanePadding.
  void (*multiply_symmetric)(const double* matrix, int64_t stride, int64_t from, int64_t to,
                             int64_t width, const double* x, double* out);
  void (*subtract_rows)(const Pass& pass, int64_t from, int64_t width);
  // (a, b) = (c a + s b, c b - s a)
  void (*rotate)(double* a, double* b, int64_t n, double c, double s);
  // At x = origin + shift; poles up to `split` count as below x.
  SecularSums (*secular_sums)(const Secular& problem, double origin, double shift, double split);
  // differences = (d - origin) - shift
  void (*differences)(const Secular& problem, double origin, double shift, double* differences);
  // weights[from:to] = prod_i (root_i - d_j) / (d_i - d_j), with 1 for each d_i - d_j = 0.
  void (*loewner_products)(const Secular& problem, const double* rows, int64_t stride, int64_t from,
                           int64_t to, double* weights);
  // row = weights / row, normalised to length 1
  void (*make_vector)(const double* weights, int64_t width, double* row);
  // out[i][k] = columns[k][i] for kLanePadding columns
  void (*interleave)(const double* const* columns, int64_t n, double* out, int64_t out_stride);
};

// Returns the loops for this machine.
const SolverLoops& solver_loops();

namespace default_isa {
extern const SolverLoops solver_loops;
}
#ifdef HIMO_X86_TILE_LOOPS
namespace avx2 {
extern const SolverLoops solver_loops;
}
namespace avx512 {
extern const SolverLoops solver_loops;
}
#endif

}  // namespace himo::cpu
