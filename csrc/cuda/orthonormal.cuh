// The last steps of the eigenvectors, by one block: one Newton-Schulz step makes nearly orthonormal
// rows orthonormal, and reflectors map eigenvectors of T to eigenvectors of A = Q T Q^T.
#pragma once

#include "cuda/device.cuh"

namespace himo::cuda {

struct alignas(16) Pair {
  double x, y;
};

constexpr int kPanel = kLanes;            // columns of Z Z^T at a time
constexpr int kPanelStride = kPanel + 2;  // pairs stay aligned

// z [count, n] becomes (3 I - Z Z^T) Z / 2, which squares Z Z^T - I. Returns the largest |Z Z^T -
// I| that this thread saw. Rows of z from count on must be 0. Ends with a barrier.
template <int SIDE>
__device__ inline double newton_schulz(double* z, double* panel,  // [SIDE, kPanelStride], scratch
                                       int count, int n) {
  constexpr int kRows = Layout<SIDE>::kRows, kColumns = Layout<SIDE>::kColumns;
  constexpr int kStride = Layout<SIDE>::kStride;
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  double result[kRows][kColumns], worst = 0;
  HIMO_UNROLL
  for (int q = 0; q < kRows; ++q) {
    HIMO_UNROLL
    for (int c = 0; c < kColumns; ++c)
      result[q][c] = 1.5 * z[(warp + kWarps * q) * kStride + lane + kLanes * c];
  }
  for (int first = 0; first < count; first += kPanel) {
    const int column = first + lane;
    double products[kRows] = {};
    for (int k = 0; k < n; k += 2) {
      const Pair other = *reinterpret_cast<const Pair*>(z + column * kStride + k);
      HIMO_UNROLL
      for (int q = 0; q < kRows; ++q) {
        const Pair own = *reinterpret_cast<const Pair*>(z + (warp + kWarps * q) * kStride + k);
        products[q] = fma(own.y, other.y, fma(own.x, other.x, products[q]));
      }
    }
    HIMO_UNROLL
    for (int q = 0; q < kRows; ++q) {
      const int row = warp + kWarps * q;
      const double error = products[q] - (row == column ? 1.0 : 0.0);
      // Not >: NaN must be seen.
      if (row < count && column < count && !((error < 0 ? -error : error) <= worst))
        worst = error < 0 ? -error : error;
      panel[row * kPanelStride + lane] = -0.5 * products[q];
    }
    __syncthreads();
    const int last = count - first < kPanel ? count - first : kPanel;
    for (int k = 0; k < last; k += 2) {
      HIMO_UNROLL
      for (int h = 0; h < 2; ++h) {
        double other[kColumns];
        HIMO_UNROLL
        for (int c = 0; c < kColumns; ++c)
          other[c] = z[(first + k + h) * kStride + lane + kLanes * c];
        HIMO_UNROLL
        for (int q = 0; q < kRows; ++q) {
          const double factor = panel[(warp + kWarps * q) * kPanelStride + k + h];
          HIMO_UNROLL
          for (int c = 0; c < kColumns; ++c) result[q][c] = fma(factor, other[c], result[q][c]);
        }
      }
    }
    __syncthreads();
  }
  HIMO_UNROLL
  for (int q = 0; q < kRows; ++q) {
    HIMO_UNROLL
    for (int c = 0; c < kColumns; ++c)
      z[(warp + kWarps * q) * kStride + lane + kLanes * c] = result[q][c];
  }
  __syncthreads();
  return worst;
}

// Returns the largest |T z - lambda z| that this thread saw, over rows of z.
template <int SIDE>
__device__ inline double largest_residual(const double* z, const double* diagonal,
                                          const double* off_diagonal, const double* eigenvalues,
                                          int count, int n) {
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  double worst = 0;
  for (int i = warp; i < count; i += kWarps) {
    const double* row = z + i * Layout<SIDE>::kStride;
    for (int j = lane; j < n; j += kLanes) {
      double residual = (diagonal[j] - eigenvalues[i]) * row[j];
      if (j > 0) residual += off_diagonal[j - 1] * row[j - 1];
      if (j + 1 < n) residual += off_diagonal[j] * row[j + 1];
      if (!((residual < 0 ? -residual : residual) <= worst))
        worst = residual < 0 ? -residual : residual;
    }
  }
  return worst;
}

// Each vector is held by kParts neighbouring lanes, in pairs of elements: lane `part` of them has
// elements 2 part + 2 kParts i and the next.
template <int SIDE>
struct Share {
  static constexpr int kParts = kThreads / SIDE;
  static constexpr int kPairs = SIDE / (2 * kParts);
};

template <int PARTS>
__device__ inline double sum_of_parts(double x) {
  HIMO_UNROLL
  for (int mask = PARTS / 2; mask > 0; mask /= 2) x += __shfl_xor_sync(kAllLanes, x, mask);
  return x;
}

// Returns v . x in each lane of a vector.
template <int SIDE>
__device__ inline double product_with(const double* v, const Pair (&x)[Share<SIDE>::kPairs]) {
  constexpr int kParts = Share<SIDE>::kParts;
  const Pair* entries = reinterpret_cast<const Pair*>(v) + threadIdx.x % kParts;
  Pair sums = {0, 0};
  HIMO_UNROLL
  for (int i = 0; i < Share<SIDE>::kPairs; ++i) {
    sums.x = fma(entries[kParts * i].x, x[i].x, sums.x);
    sums.y = fma(entries[kParts * i].y, x[i].y, sums.y);
  }
  return sum_of_parts<kParts>(sums.x + sums.y);
}

// Applies the reflectors k in [32 FIRST, 32 (FIRST + 1)), k <= n - 3, last one first. product is
// v_k . x of the first of them, and then of the one after them. One pass over x for each: it
// applies one reflector and multiplies by the next, which needs each v twice but few registers.
template <int SIDE, int FIRST>
__device__ inline void reflect(Pair (&x)[Share<SIDE>::kPairs], double& product,
                               const double* reflectors, const double* factors, int n) {
  constexpr int kParts = Share<SIDE>::kParts, kPairs = Share<SIDE>::kPairs;
  constexpr int kFirstPair = kLanes * FIRST / (2 * kParts);  // v is 0 before it
  const int part = threadIdx.x % kParts;
  const int last = n - 3 < kLanes * (FIRST + 1) - 1 ? n - 3 : kLanes * (FIRST + 1) - 1;
  for (int k = last; k >= kLanes * FIRST; --k) {
    const Pair* v = reinterpret_cast<const Pair*>(reflectors + k * SIDE) + part;
    const Pair* next =
        reinterpret_cast<const Pair*>(reflectors + (k > 0 ? k - 1 : 0) * SIDE) + part;
    const double scaled = -factors[k] * product;
    Pair sums = {0, 0};
    HIMO_UNROLL
    for (int i = kFirstPair; i < kPairs; ++i) {
      const Pair entries = v[kParts * i], of_next = next[kParts * i];
      x[i].x = fma(scaled, entries.x, x[i].x);
      x[i].y = fma(scaled, entries.y, x[i].y);
      sums.x = fma(of_next.x, x[i].x, sums.x);
      sums.y = fma(of_next.y, x[i].y, sums.y);
    }
    product = sum_of_parts<kParts>(sums.x + sums.y);
  }
}

// Writes Q z for each row of z as a column of out [n, n], from column `first` on. z is overwritten.
template <int SIDE>
__device__ inline void back_transform(double* z,                 // [SIDE, kStride], shared memory
                                      const double* reflectors,  // [n, SIDE], global memory
                                      const double* factors, int first, int count, int n,
                                      double* out) {
  constexpr int kParts = Share<SIDE>::kParts, kPairs = Share<SIDE>::kPairs;
  const int vector = threadIdx.x / kParts, part = threadIdx.x % kParts;
  Pair x[kPairs];
  HIMO_UNROLL
  for (int i = 0; i < kPairs; ++i) {
    x[i] = reinterpret_cast<const Pair*>(z + vector * Layout<SIDE>::kStride)[part + kParts * i];
  }
  __syncthreads();
  for (int at = threadIdx.x; at < (n - 2) * SIDE; at += kThreads) {
    z[at] = at % SIDE > at / SIDE ? reflectors[at] : 0.0;
  }
  __syncthreads();
  double product = n > 2 ? product_with<SIDE>(z + (n - 3) * SIDE, x) : 0.0;
  const auto apply = [&](auto phase) {
    if constexpr (phase.value < SIDE / kLanes)
      reflect<SIDE, phase.value>(x, product, z, factors, n);
  };
  apply(Constant<3>{});
  apply(Constant<2>{});
  apply(Constant<1>{});
  apply(Constant<0>{});
  if (vector >= count) return;
  HIMO_UNROLL
  for (int i = 0; i < kPairs; ++i) {
    const int row = 2 * (part + kParts * i);
    if (row < n) out[row * n + first + vector] = x[i].x;
    if (row + 1 < n) out[(row + 1) * n + first + vector] = x[i].y;
  }
}

}  // namespace himo::cuda
