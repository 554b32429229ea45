// Reduction of a symmetric matrix to tridiagonal form by Householder reflections, A = Q T Q^T.
#pragma once

#include <cstdint>

namespace himo::cpu {

// Row stride of the solver's matrices: an odd number of cache lines. A stride with a large power of
// two would map the entries of a column to few cache sets.
constexpr int64_t solver_stride(int64_t n) { return ((n + 7) / 8 | 1) * 8; }

// Return the size of `work` below, in doubles.
int64_t tridiagonalise_work(int64_t n);
int64_t back_transform_work(int64_t n);

// Reads the upper half of the matrix and overwrites the matrix with the reflections. n >= 2.
void tridiagonalise(double* matrix,           // [n, n], row-major; row j becomes v_j, 0 up to j
                    int64_t n, double scale,  // the matrix is multiplied by it first
                    double* diagonal,         // [n]
                    double* off_diagonal,     // [n], n - 1 used
                    double* factors,          // [n], n - 1 used: H_j = I - factor v_j v_j^T
                    double* work);            // fastest when aligned to a cache line

// rows <- rows Q^T: transforms eigenvectors of T, as rows, into eigenvectors of A.
void back_transform(const double* reflections,  // [n, n], from tridiagonalise
                    const double* factors, int64_t n,
                    double* rows,  // [n, stride]
                    int64_t stride, double* work);

}  // namespace himo::cpu
