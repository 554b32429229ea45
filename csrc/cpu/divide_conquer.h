// Eigenvalues and eigenvectors of a symmetric tridiagonal matrix, by divide and conquer.
#pragma once

#include <cstdint>

namespace himo::cpu {

// Returns the size of `work` below, in doubles.
int64_t divide_conquer_work(int64_t n);

// Entries must be at most of order 1.
void solve_tridiagonal(double* diagonal,      // [n]; overwritten with the eigenvalue of each row
                       double* off_diagonal,  // [n - 1], overwritten
                       int64_t n,
                       double* rows,     // [n, solver_stride(n)], eigenvectors
                       int64_t* sorted,  // [n]; diagonal[sorted[i]] ascends
                       double* work);

}  // namespace himo::cpu
