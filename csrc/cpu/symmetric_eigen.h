// Eigenvalues and eigenvectors of a symmetric matrix, by torch's LAPACK or by our own solver:
// reduction to tridiagonal form, then divide and conquer.
#pragma once

#include <cstdint>

namespace himo::cpu {

enum class Eigensolver { kLapack, kHimo };

// Returns the faster one for an n x n matrix on processors of this class.
Eigensolver fastest_eigensolver(int64_t n);

// The length of LAPACK's work array, 1 + 6 n + 2 n^2, is a 32-bit integer.
constexpr int64_t kLargestSide = 32766;

// Returns the size of `work` of solve_symmetric, in doubles; n <= kLargestSide.
int64_t solver_work(int64_t n, Eigensolver solver);

// Overwrites the symmetric matrix with its eigenvectors as columns, by descending eigenvalue.
// Entries must be finite: otherwise LAPACK may throw because it does not converge, and the result
// of our solver is undefined. Results are bitwise reproducible for a given number of threads.
void solve_symmetric(double* matrix,       // [n, n], row-major
                     double* eigenvalues,  // [n], descending
                     int64_t n,
                     double* work,  // [solver_work(n, solver)]
                     Eigensolver solver);

}  // namespace himo::cpu
