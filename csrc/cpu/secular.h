// Eigenvalues and eigenvectors of diag(d) + rho z z^T.
#pragma once

#include <cstdint>

namespace himo::cpu {

// Entries are at most of order 1, |z| is 1 or less. No two d are closer than 1e-32 and no z is
// smaller: products of four differences neither overflow nor vanish. The arrays are in any order
// and padded to a multiple of 8, with z = 0 and with d beyond every eigenvalue.
struct Secular {
  int64_t count;
  double rho;             // > 0
  const double *d, *z;    // [round_up(count)]
  const int64_t* sorted;  // [count]; d[sorted[i]] ascends
};

// Writes the eigenvalues, ascending, and orthonormal eigenvectors in rows.
void solve_secular(const Secular& problem,
                   double* eigenvalues,  // [count]
                   double* rows,         // [count, stride]
                   int64_t stride,
                   double* weights);  // [round_up(count)], scratch

}  // namespace himo::cpu
