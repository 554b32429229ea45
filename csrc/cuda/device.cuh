// What the kernels share. Their sources compile with bare nvcc, and with a C++ compiler for the
// host (emulate/cuda_on_host.h); there is no header of torch in csrc/cuda.
#pragma once

#ifdef __CUDACC__
#include <cmath>
#include <cstdint>

#define HIMO_PRAGMA(text) _Pragma(#text)
#define HIMO_UNROLL HIMO_PRAGMA(unroll)
#define HIMO_LAUNCH(kernel, blocks, threads, shared, stream, ...) \
  kernel<<<static_cast<unsigned>(blocks), threads, shared, stream>>>(__VA_ARGS__)
#define HIMO_UNROLL_BY(count) HIMO_PRAGMA(unroll count)
#else
#include "emulate/cuda_on_host.h"

#define HIMO_UNROLL
#define HIMO_LAUNCH(kernel, blocks, threads, shared, stream, ...) \
  himo::emulate::launch(blocks, threads, shared, stream, [=] { kernel(__VA_ARGS__); })
#define HIMO_UNROLL_BY(count)
#endif

namespace himo::cuda {

constexpr int kLanes = 32;
constexpr unsigned kAllLanes = ~0u;
constexpr double kEps = 0x1p-52;

// A number that a template can depend on.
template <int VALUE>
struct Constant {
  static constexpr int value = VALUE;
};

#ifdef __CUDACC__
extern __shared__ __align__(16) char shared_bytes[];

// Divides the shared memory of a block into arrays, 16-byte aligned.
class SharedMemory {
 public:
  template <class T>
  __device__ T* array(size_t count) {
    T* start = reinterpret_cast<T*>(shared_bytes + used_);
    used_ += (count * sizeof(T) + 15) / 16 * 16;
    return start;
  }

 private:
  size_t used_ = 0;
};

__device__ inline int high_word(double x) { return __double2hiint(x); }
__device__ inline double from_high_word(int word) { return __hiloint2double(word, 0); }

// 1 / x and 1 / sqrt(x) to 1 or 2 ulp, for normal x and results: the hardware's approximation
// (PTX ISA: 20 bits) and two Newton steps, without the branch for other numbers.
__device__ inline double reciprocal(double x) {
  double r;
  asm("rcp.approx.ftz.f64 %0, %1;" : "=d"(r) : "d"(x));
  r = fma(fma(-x, r, 1.0), r, r);
  return fma(fma(-x, r, 1.0), r, r);
}
__device__ inline double inverse_root(double x) {
  double r;
  asm("rsqrt.approx.ftz.f64 %0, %1;" : "=d"(r) : "d"(x));
  HIMO_UNROLL
  for (int step = 0; step < 2; ++step) r = fma(0.5 * r, fma(-x * r, r, 1.0), r);
  return r;
}
#else
using emulate::SharedMemory;

inline int high_word(double x) {
  int64_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return static_cast<int>(bits >> 32);
}
inline double from_high_word(int word) {
  const int64_t bits =
      static_cast<int64_t>(static_cast<uint64_t>(static_cast<uint32_t>(word)) << 32);
  double x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
inline double reciprocal(double x) { return 1.0 / x; }
inline double inverse_root(double x) { return 1.0 / std::sqrt(x); }
#endif

// Returns the sum over the warp, the same bits in every lane.
__device__ inline double sum_of_warp(double x) {
  HIMO_UNROLL
  for (int mask = kLanes / 2; mask > 0; mask /= 2) x += __shfl_xor_sync(kAllLanes, x, mask);
  return x;
}

template <class T>
__device__ inline T largest_of_warp(T x) {
  HIMO_UNROLL
  for (int mask = kLanes / 2; mask > 0; mask /= 2) {
    const T other = __shfl_xor_sync(kAllLanes, x, mask);
    x = other > x ? other : x;
  }
  return x;
}

// A lane and the lane `mask` away add up their values. The lane without this bit gets the sum of
// low, the other the sum of high.
__device__ inline double exchange_sum(double low, double high, int lane, int mask) {
  const bool upper = lane & mask;
  return (upper ? high : low) + __shfl_xor_sync(kAllLanes, upper ? low : high, mask);
}

// Returns to each lane the sum of x[lane / (2 MASK / COUNT) % COUNT] over lanes that differ in the
// bits up to MASK. Half of the sums go to the other half of the lanes until each lane has one: 9
// exchanges for 8 sums over a warp, instead of 40.
template <int COUNT, int MASK = kLanes / 2>
__device__ inline double exchange_sums(double (&x)[COUNT], int lane) {
  int mask = MASK;
  HIMO_UNROLL
  for (int half = COUNT / 2; half > 0; half /= 2, mask /= 2) {
    HIMO_UNROLL
    for (int i = 0; i < half; ++i) x[i] = exchange_sum(x[i], x[i + half], lane, mask);
  }
  HIMO_UNROLL
  for (; mask > 0; mask /= 2) x[0] += __shfl_xor_sync(kAllLanes, x[0], mask);
  return x[0];
}

// How a block of kThreads threads holds a matrix of SIDE x SIDE: thread (warp, lane) has rows
// warp + kWarps q and columns lane + 32 c.
constexpr int kWarps = 16;
constexpr int kThreads = kWarps * kLanes;
template <int SIDE>
struct Layout {
  static constexpr int kRows = SIDE / kWarps;
  static constexpr int kColumns = SIDE / kLanes;
  static constexpr int kStride = SIDE + 2;  // of a matrix in shared memory: pairs without conflicts
};

}  // namespace himo::cuda
