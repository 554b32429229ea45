// Eigenvalues and eigenvectors of small symmetric matrices on a GPU, for HiDe: one launch, one
// block a matrix, no synchronisation with the host. Not yet run on hardware, and no backend calls
// it.
#pragma once

#include <cstdint>

extern "C" {

constexpr int himo_cuda_largest_side = 128;

// Returns the size of `work` below, in doubles for each matrix.
int64_t himo_cuda_symmetric_eigen_work(int n);

// Solves each matrix and returns the CUDA error of the launch, 0 if there is none;
// cudaErrorInvalidValue unless 1 <= n <= 128 and 0 <= problems < 2^31. All pointers are to the
// device's memory.
//
// With `threshold`, only the vectors that HiDe reads are computed, at most n / 2: the first `rank`
// or the last n - rank columns of `vectors`, whichever are fewer (the last if equal); other columns
// are not written. The rank is the smallest whose eigenvalues, none counted below 0, reach this
// share of their sum; n if that sum is not above relative (sum + shift) + absolute.
//
// certified is 1 if |Z Z^T - I| and |T z - lambda z| are at rounding level for the vectors Z of the
// tridiagonal form T; elsewhere use another solver. Of a matrix that is not finite all results are
// NaN, the rank is n, and certified is 0.
int himo_cuda_symmetric_eigen(const double* matrices,  // [problems, n, n], symmetric up to rounding
                              double* eigenvalues,     // [problems, n], descending
                              double* vectors,         // [problems, n, n], as columns
                              int64_t* rank,           // [problems]; n without threshold
                              int* certified,          // [problems]
                              double* work,  // [problems, himo_cuda_symmetric_eigen_work(n)]
                              const double* threshold,  // [] or null: all vectors
                              const double* shifts,     // [problems], or null: 0
                              double relative, double absolute, int64_t problems, int n,
                              void* stream);
}
