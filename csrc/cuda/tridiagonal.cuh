// Householder reduction to tridiagonal form, A = Q T Q^T, by one block, with A in registers.
#pragma once

#include "cuda/device.cuh"

namespace himo::cuda {

// What the warps tell each other. A step writes one half of each array and reads the other.
template <int SIDE>
struct Messages {
  double* images;      // [2, SIDE], A v
  double* pivots;      // [2, SIDE], the next row to reduce, without the last update
  double* reflectors;  // [2, SIDE], v

  __device__ explicit Messages(SharedMemory& shared)
      : images(shared.array<double>(2 * SIDE)),
        pivots(shared.array<double>(2 * SIDE)),
        reflectors(shared.array<double>(2 * SIDE)) {}
};

// A reflector H = I - factor v v^T, and the update A - v w^T - w v^T that follows from it. Every
// warp holds it; lane l has the entries l + 32 c.
template <int SIDE>
struct Update {
  double v[Layout<SIDE>::kColumns] = {};
  double w[Layout<SIDE>::kColumns] = {};
  double factor = 0, half = 0;  // w = factor A v - half v
};

// Steps [32 FIRST, 32 (FIRST + 1)) of the reduction, in which the rows before 2 FIRST and the
// columns before FIRST of a thread are done. One barrier a step: all warps compute v and w from the
// same messages, in the same order.
template <int SIDE, int FIRST>
__device__ inline void reduce_columns(double (&a)[Layout<SIDE>::kRows][Layout<SIDE>::kColumns],
                                      Update<SIDE>& update, const Messages<SIDE>& messages, int n,
                                      double* diagonal, double* off_diagonal, double* factors,
                                      double* reflectors) {
  constexpr int kRows = Layout<SIDE>::kRows, kColumns = Layout<SIDE>::kColumns;
  constexpr int kFirstRow = FIRST * kLanes / kWarps;
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int last = n < kLanes * (FIRST + 1) ? n : kLanes * (FIRST + 1);
  for (int k = kLanes * FIRST; k < last; ++k) {
    const int now = k % 2 * SIDE, before = SIDE - now;
    // Row k with the last update.
    const double v_k = messages.reflectors[before + k];
    const double w_k = update.factor * messages.images[before + k] - update.half * v_k;
    double row[kColumns], squares = 0;
    HIMO_UNROLL
    for (int c = FIRST; c < kColumns; ++c) {
      const int j = lane + kLanes * c;
      row[c] = fma(-w_k, update.v[c], fma(-v_k, update.w[c], messages.pivots[before + j]));
      const double tail = j > k + 1 ? row[c] : 0.0;
      squares = fma(tail, tail, squares);
      if (warp == 0 && j == k) diagonal[k] = row[c];
    }
    // Lane (k + 1) % 32 has the entry that stays; it lies in the last or the next column of a
    // thread.
    double first = 0;
    HIMO_UNROLL
    for (int c = FIRST; c < kColumns; ++c) first = (k + 1) / kLanes == c ? row[c] : first;
    first = __shfl_sync(kAllLanes, first, (k + 1) % kLanes);
    const double rest = sum_of_warp(squares);
    const bool reflects = rest > 0x1p-400;  // smaller entries are 0 relative to entries near 1
    const double square = reflects ? first * first + rest : 1.0;
    const double norm = square * inverse_root(square);
    const double end = reflects ? (first > 0 ? -norm : norm) : first;
    const double head = reflects ? first - end : 0.0;
    const double factor = reflects ? reciprocal(square + (first > 0 ? first : -first) * norm) : 0.0;
    double v[kColumns] = {};
    HIMO_UNROLL
    for (int c = FIRST; c < kColumns; ++c) {
      const int j = lane + kLanes * c;
      v[c] = reflects && j > k + 1 ? row[c] : j == k + 1 ? head : 0.0;
      if (warp == 0) messages.reflectors[now + j] = reflectors[k * SIDE + j] = v[c];
    }
    if (warp == 0 && lane == 0) {
      off_diagonal[k] = k + 1 < n ? end : 0.0;
      factors[k] = factor;
    }
    // One pass: the last update, and the product with v.
    const auto pass = [&](int q) {
      double image = 0;
      if (q < kFirstRow) return image;
      const int i = warp + kWarps * q;
      const double v_i = messages.reflectors[before + i];
      const double w_i = update.factor * messages.images[before + i] - update.half * v_i;
      HIMO_UNROLL
      for (int c = FIRST; c < kColumns; ++c) {
        a[q][c] = fma(-w_i, update.v[c], fma(-v_i, update.w[c], a[q][c]));
        image = fma(a[q][c], v[c], image);
        if (i == k + 1) messages.pivots[now + lane + kLanes * c] = a[q][c];
      }
      return image;
    };
    double images[kRows / 2];
    HIMO_UNROLL
    for (int q = 0; q < kRows / 2; ++q)
      images[q] = exchange_sum(pass(q), pass(q + kRows / 2), lane, kLanes / 2);
    const double image = exchange_sums<kRows / 2, kLanes / 4>(images, lane);
    constexpr int kLanesPerRow = kLanes / kRows;
    if (lane % kLanesPerRow == 0)
      messages.images[now + warp + kWarps * (lane / kLanesPerRow)] = image;
    __syncthreads();
    double product = 0;
    HIMO_UNROLL
    for (int c = FIRST; c < kColumns; ++c) {
      const int j = lane + kLanes * c;
      update.w[c] = j > k ? messages.images[now + j] : 0.0;  // A v, for now
      product += update.w[c] * v[c];
    }
    update.factor = factor;
    update.half = 0.5 * factor * (factor * sum_of_warp(product));
    HIMO_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      update.w[c] = factor * update.w[c] - update.half * v[c];
      update.v[c] = v[c];
    }
  }
}

// Reduces the matrix; its rows and columns from n on are 0. Ends with a barrier.
template <int SIDE>
__device__ inline void tridiagonalise(double (&a)[Layout<SIDE>::kRows][Layout<SIDE>::kColumns],
                                      const Messages<SIDE>& messages, int n,
                                      double* diagonal,      // [n]
                                      double* off_diagonal,  // [n], the last is 0
                                      double* factors,       // [n]
                                      double* reflectors) {  // [n, SIDE], row k holds v_k
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  for (int i = threadIdx.x; i < SIDE; i += kThreads) {
    messages.images[SIDE + i] = messages.reflectors[SIDE + i] = 0;
  }
  if (warp == 0) {
    HIMO_UNROLL
    for (int c = 0; c < Layout<SIDE>::kColumns; ++c)
      messages.pivots[SIDE + lane + kLanes * c] = a[0][c];
  }
  __syncthreads();
  Update<SIDE> update;
  const auto reduce = [&](auto first) {
    if constexpr (first.value < SIDE / kLanes) {
      reduce_columns<SIDE, first.value>(a, update, messages, n, diagonal, off_diagonal, factors,
                                        reflectors);
    }
  };
  reduce(Constant<0>{});
  reduce(Constant<1>{});
  reduce(Constant<2>{});
  reduce(Constant<3>{});
}

}  // namespace himo::cuda
