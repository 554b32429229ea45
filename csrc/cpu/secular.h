// Eigenvalues and eigenvectors of diag(d) + rho z z^T.
#pragma once

#include <cstdint>

#include "cpu/solver_loops.h"

namespace himo::cpu {

// Entries are at most of order 1 and |z| <= 1. The distance of any two d and the magnitude of every
// z is at least 1e-32, so that products of four differences neither overflow nor underflow. The
// arrays need not be sorted. They are padded to a multiple of 8, with z = 0 and d greater than
// every eigenvalue. Writes the eigenvalues in ascending order and orthonormal eigenvectors as rows.
void solve_secular(const Secular& problem,
                   double* eigenvalues,  // [count]
                   double* rows,         // [count, stride]
                   int64_t stride,
                   double* weights);  // [round_up(count)], scratch

}  // namespace himo::cpu
