// Eigenvectors of a tridiagonal matrix T, |T| >= 1, by inverse iteration, by one block.
#pragma once

#include "cuda/device.cuh"

namespace himo::cuda {

// Elimination of T - shift with row exchanges, one thread for each shift: element [i, thread] of
// each plane. The threads of a warp read and write whole cache lines.
template <int SIDE>
struct Elimination {
  double* inverses;      // 1 / pivot
  double* seconds;       // U's diagonal above the pivots
  double* thirds;        // and the one above that
  double* ratios;        // what of row i is subtracted from row i + 1
  unsigned char* swaps;  // whether rows i and i + 1 were exchanged, in shared memory

  static constexpr int kPlanes = 4;
  __device__ Elimination(double* planes, unsigned char* swaps)
      : inverses(planes),
        seconds(planes + SIDE * SIDE),
        thirds(planes + 2 * SIDE * SIDE),
        ratios(planes + 3 * SIDE * SIDE),
        swaps(swaps) {}
};

// Returns whether |x| < |y|, up to the low half of the digits: any exchange is right for rows that
// are about equal.
__device__ inline bool smaller(double x, double y) {
  return (high_word(x) & 0x7fffffff) < (high_word(y) & 0x7fffffff);
}

__device__ inline double inverse_pivot(double pivot) {
  return reciprocal(smaller(pivot, kEps) ? kEps : pivot);
}

// Any start will do that differs between vectors: a hash of both indices, in [-1/2, 1/2).
__device__ inline double random_start(int vector, int i) {
  uint32_t bits = vector * 1024 + i;
  bits = (bits ^ bits >> 16) * 0x85EBCA6Bu;
  bits = (bits ^ bits >> 13) * 0xC2B2AE35u;
  return static_cast<double>(bits ^ bits >> 16) * 0x1p-32 - 0.5;
}

// Eliminates, and replaces the right-hand side z [n].
template <int SIDE>
__device__ inline void eliminate(const Elimination<SIDE>& u, const double* diagonal,
                                 const double* off_diagonal, int n, double shift, int vector,
                                 double* z) {
  double pivot = diagonal[0] - shift, second = off_diagonal[0], y = z[0];
  for (int i = 0; i + 1 < n; ++i) {
    const int at = i * SIDE + vector;
    const double below = off_diagonal[i], next = diagonal[i + 1] - shift;
    const double next_second = off_diagonal[i + 1], next_y = z[i + 1];
    const bool swap = smaller(pivot, below);
    const double inverse = inverse_pivot(swap ? below : pivot);
    const double ratio = (swap ? pivot : below) * inverse;
    const double upper_second = swap ? next : second, upper_third = swap ? next_second : 0.0;
    const double upper_y = swap ? next_y : y;
    pivot = (swap ? second : next) - ratio * upper_second;
    second = (swap ? 0.0 : next_second) - ratio * upper_third;
    y = (swap ? y : next_y) - ratio * upper_y;
    u.inverses[at] = inverse;
    u.seconds[at] = upper_second;
    u.thirds[at] = upper_third;
    u.ratios[at] = ratio;
    u.swaps[at] = swap;
    z[i] = upper_y;
  }
  u.inverses[(n - 1) * SIDE + vector] = inverse_pivot(pivot);
  z[n - 1] = y;
}

// z [n] becomes the right-hand side after the same exchanges and subtractions.
template <int SIDE>
__device__ inline void eliminate_again(const Elimination<SIDE>& u, int n, int vector, double* z) {
  double y = z[0];
  HIMO_UNROLL_BY(4)
  for (int i = 0; i + 1 < n; ++i) {
    const int at = i * SIDE + vector;
    const bool swap = u.swaps[at];
    const double next = z[i + 1], upper = swap ? next : y;
    z[i] = upper;
    y = (swap ? y : next) - u.ratios[at] * upper;
  }
  z[n - 1] = y;
}

// z [n] becomes the solution of U x = z.
template <int SIDE>
__device__ inline void substitute(const Elimination<SIDE>& u, int n, int vector, double* z) {
  double x = z[n - 1] * u.inverses[(n - 1) * SIDE + vector], after = 0;
  z[n - 1] = x;
  HIMO_UNROLL_BY(4)
  for (int i = n - 2; i >= 0; --i) {
    const int at = i * SIDE + vector;
    const double inverse = u.inverses[at];
    const double rest = (z[i] - u.thirds[at] * after) * inverse;
    after = x;
    x = rest - u.seconds[at] * inverse * x;
    z[i] = x;
  }
}

// Gives rows [first, end) of z length 1; a row of zeros stays.
template <int SIDE>
__device__ inline void normalise_rows(double* z, int first, int end) {
  constexpr int kColumns = Layout<SIDE>::kColumns, kStride = Layout<SIDE>::kStride;
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  HIMO_UNROLL_BY(4)  // rows are independent: their chains overlap
  for (int i = first + warp; i < end; i += kWarps) {
    double row[kColumns], squares = 0;
    int exponent = 0;
    HIMO_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      row[c] = z[i * kStride + lane + kLanes * c];
      const int own = high_word(row[c]) & 0x7ff00000;
      exponent = own > exponent ? own : exponent;
    }
    // First divided by a power of two near the largest, as squares of the solutions may overflow.
    const double scale = from_high_word(0x7fe00000 - largest_of_warp(exponent));
    HIMO_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      row[c] *= scale;
      squares = fma(row[c], row[c], squares);
    }
    squares = sum_of_warp(squares);
    const double length = squares > 0 ? inverse_root(squares) : 0.0;
    HIMO_UNROLL
    for (int c = 0; c < kColumns; ++c) z[i * kStride + lane + kLanes * c] = row[c] * length;
  }
}

// Gram-Schmidt among the vectors of a cluster, whose directions the solutions leave open. Rows have
// length 1 before and after.
template <int SIDE>
__device__ inline void separate_clusters(double* z, const int* last_of_cluster, int count) {
  constexpr int kColumns = Layout<SIDE>::kColumns, kStride = Layout<SIDE>::kStride;
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  for (int k = 0; k < count; ++k) {
    const int last = last_of_cluster[k];
    if (last == k) continue;
    double q[kColumns], squares = 0;
    HIMO_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      q[c] = z[k * kStride + lane + kLanes * c];
      squares += q[c] * q[c];
    }
    squares = sum_of_warp(squares);
    const double length = squares > 0x1p-900 ? reciprocal(squares) : 0.0;  // squared, inverse
    for (int i = k + 1 + ((warp - k - 1) & (kWarps - 1)); i <= last; i += kWarps) {
      double product = 0;
      HIMO_UNROLL
      for (int c = 0; c < kColumns; ++c) product += q[c] * z[i * kStride + lane + kLanes * c];
      product = sum_of_warp(product) * length;
      HIMO_UNROLL
      for (int c = 0; c < kColumns; ++c) z[i * kStride + lane + kLanes * c] -= product * q[c];
    }
    __syncthreads();
    if (k + 1 == last) {  // the cluster is done
      int first = k;
      while (first > 0 && last_of_cluster[first - 1] == last) --first;
      normalise_rows<SIDE>(z, first, last + 1);
    }
  }
}

// Writes nearly orthonormal eigenvectors as rows of z [count, n]; columns from n on become 0. Ends
// with a barrier.
template <int SIDE>
__device__ inline void iterate(const Elimination<SIDE>& u, const double* diagonal,
                               const double* off_diagonal, const double* shifts,
                               const int* last_of_cluster, int count, int n, double* z) {
  const int vector = threadIdx.x;
  double* own = z + vector * Layout<SIDE>::kStride;
  for (int at = threadIdx.x; at < SIDE * Layout<SIDE>::kStride; at += kThreads) {
    const int i = at / Layout<SIDE>::kStride, j = at % Layout<SIDE>::kStride;
    z[at] = i < count && j < n ? random_start(i, j) : 0.0;
  }
  __syncthreads();
  for (int round = 0; round < 2; ++round) {
    if (vector < count) {
      if (round == 0) {
        eliminate(u, diagonal, off_diagonal, n, shifts[vector], vector, own);
      } else {
        eliminate_again(u, n, vector, own);
      }
      substitute(u, n, vector, own);
    }
    __syncthreads();
    normalise_rows<SIDE>(z, 0, count);
    __syncthreads();
    separate_clusters<SIDE>(z, last_of_cluster, count);
    __syncthreads();
  }
}

}  // namespace himo::cuda
