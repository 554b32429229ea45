// The eigenvalues of a tridiagonal matrix T by bisection on Sturm counts, by one block.
#pragma once

#include "cuda/device.cuh"

namespace himo::cuda {

// Row i of T, as a count reads it.
struct alignas(16) SturmRow {
  double diagonal, square;  // square: of the element before it in the row; not 0
};

constexpr int kRescale = 16;  // steps between which minors neither overflow nor underflow

// Returns how many eigenvalues are below x: the number of sign changes of the leading minors
// p_i = (d_i - x) p_{i-1} - e_{i-1}^2 p_{i-2} of T - x, one fused multiply-add after another where
// the usual quotients p_i / p_{i-1} need a division each. The rounding is a relative change of T's
// elements (Wilkinson, The Algebraic Eigenvalue Problem, 5.38). A minor that is 0 lies between two
// of opposite sign, as squares are not 0, so its own sign does not matter.
__device__ inline int count_below(const SturmRow* rows,  // whole groups of kRescale
                                  int n, double x) {
  double p = 1, before = 0;
  int count = 0;
  for (int i = 0; i < n; i += kRescale) {
    HIMO_UNROLL
    for (int j = 0; j < kRescale; ++j) {
      const SturmRow row = rows[i + j];
      const double next = fma(row.diagonal - x, p, -(row.square * before));
      count += static_cast<unsigned>(high_word(next) ^ high_word(p)) >> 31;
      before = p;
      p = next;
    }
    // Divide by the power of two of the larger. The exponent of its inverse is 0x7fe00000 minus its
    // exponent.
    constexpr int kExponent = 0x7ff00000;
    const int a = high_word(p) & kExponent, b = high_word(before) & kExponent;
    const double inverse = from_high_word(0x7fe00000 - (a > b ? a : b));
    p *= inverse;
    before *= inverse;
  }
  return count;
}

// Returns how often kThreads / SIDE points cut each bracket until it is as wide as the rounding.
template <int SIDE>
__host__ __device__ constexpr int bisections() {
  double width = 2.0 / (kThreads + 1);  // in units of the bound of the spectrum
  int count = 0;
  for (; width > kEps; ++count) width /= kThreads / SIDE + 1;
  return count;
}

// Writes the eigenvalues. Ends with a barrier.
template <int SIDE>
__device__ inline void bisect(const SturmRow* rows,   // [SIDE]; from n on the diagonal is 2 bound
                              int n, double bound,    // |eigenvalue| <= bound
                              int* counts,            // [kThreads], scratch
                              double* eigenvalues) {  // [n], descending
  constexpr int kPoints = kThreads / SIDE;
  const int thread = threadIdx.x, eigenvalue = thread / kPoints, point = thread % kPoints;
  // First all brackets share the points.
  constexpr double kFirst = 1.0 / (kThreads + 1), kShare = 1.0 / (kPoints + 1);
  counts[thread] = count_below(rows, n, bound * (2 * kFirst * (thread + 1) - 1));
  __syncthreads();
  int passed = 0;  // points that are not above the eigenvalue
  HIMO_UNROLL
  for (int step = kThreads / 2; step > 0; step /= 2) {
    if (counts[passed + step - 1] <= eigenvalue) passed += step;
  }
  if (passed == kThreads - 1 && counts[kThreads - 1] <= eigenvalue) passed = kThreads;
  double low = bound * (2 * kFirst * passed - 1), width = 2 * kFirst * bound;
  constexpr int kSteps = bisections<SIDE>();
  for (int step = 0; step < kSteps; ++step) {
    const double x = low + width * kShare * (point + 1);
    const unsigned below = __ballot_sync(kAllLanes, count_below(rows, n, x) <= eigenvalue);
    const int first_lane = thread % kLanes / kPoints * kPoints;
    width *= kShare;
    low += width * __popc(below >> first_lane & ((1u << kPoints) - 1));
  }
  if (point == 0 && eigenvalue < n) eigenvalues[n - 1 - eigenvalue] = low + 0.5 * width;
  __syncthreads();
}

}  // namespace himo::cuda
