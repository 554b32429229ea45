// Reduction of a symmetric matrix to tridiagonal form by Householder reflections, A = Q T Q^T.
#pragma once

#include <cstdint>

namespace himo::cpu {

// The distance between rows of the solver's own matrices: whole cache lines, an odd number of them,
// so that no power of two sends the entries of a column to few sets of the cache.
constexpr int64_t solver_stride(int64_t n) { return ((n + 7) / 8 | 1) * 8; }

// Return how many doubles the functions below need as work.
int64_t tridiagonalise_work(int64_t n);
int64_t back_transform_work(int64_t n);

// Replaces the matrix, of which the upper half is read, by the reflections. n >= 2.
void tridiagonalise(double* matrix,           // [n, n], row-major; row j becomes v_j, 0 up to j
                    int64_t n, double scale,  // of the matrix, applied before all
                    double* diagonal,         // [n]
                    double* off_diagonal,     // [n], of which n - 1
                    double* factors,          // [n], of which n - 1: H_j = I - factor v_j v_j^T
                    double* work);            // quickest from a cache line on

// rows <- rows Q^T: eigenvectors of T, in rows, become those of A.
void back_transform(const double* reflections,  // [n, n], from tridiagonalise
                    const double* factors, int64_t n,
                    double* rows,  // [n, stride]
                    int64_t stride, double* work);

}  // namespace himo::cpu
