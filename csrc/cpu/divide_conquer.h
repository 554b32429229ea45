// Eigenvalues and eigenvectors of a symmetric tridiagonal matrix, by divide and conquer.
#pragma once

#include <cstdint>

namespace himo::cpu {

// Returns how many doubles solve_tridiagonal needs as work.
int64_t divide_conquer_work(int64_t n);

// Entries are at most of order 1.
void solve_tridiagonal(double* diagonal,      // [n]; becomes the eigenvalues, by rows
                       double* off_diagonal,  // [n - 1], overwritten
                       int64_t n,
                       double* rows,     // [n, solver_stride(n)], eigenvectors
                       int64_t* sorted,  // [n]; eigenvalues ascend in this order of rows
                       double* work);

}  // namespace himo::cpu
