// A kernel with one planted fault, given by number, to show that each is found on the host.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda/device.cuh"

namespace himo::cuda {

enum Fault {
  kNone,
  kNoBarrier,       // the sums of the warps are read before all are written
  kShuffleAsFence,  // a lane reads what another wrote, with only a shuffle between
  kSameOutput,      // two blocks write one element
  kPastShared,      // one past the end of an array of shared memory
  kPastGlobal,      // one past the end of the output
  kUnwritten,       // an element of shared memory is read that no thread wrote
  kSomeWait,        // some lanes wait at a barrier that the others of their warp never reach
};

// out[row] = the sum of row [n], one block a row.
__global__ void row_sums(const float* x, float* out, int n, int rows, Fault fault) {
  SharedMemory shared;
  float* partial = shared.array<float>(kWarps);
  float* total = shared.array<float>(1);
  const int thread = threadIdx.x, warp = thread / kLanes, lane = thread % kLanes;
  const int row = blockIdx.x;
  float sum = 0;
  if (fault == kSomeWait && lane < 16) __syncthreads();
  for (int i = thread; i < n; i += kThreads) sum += x[row * n + i];
  for (int mask = kLanes / 2; mask > 0; mask /= 2) sum += __shfl_xor_sync(kAllLanes, sum, mask);
  if (lane == 0 && !(fault == kUnwritten && warp == 1))
    partial[warp + (fault == kPastShared && warp == kWarps - 1)] = sum;
  if (fault != kNoBarrier) __syncthreads();
  if (warp > 0) return;
  sum = lane < kWarps ? partial[lane] : 0;
  for (int mask = kLanes / 2; mask > 0; mask /= 2) sum += __shfl_xor_sync(kAllLanes, sum, mask);
  if (lane == 0) *total = sum;
  if (fault == kShuffleAsFence) {
    sum = __shfl_sync(kAllLanes, sum, 0);
  } else {
    __syncwarp();
  }
  if (lane == 1) out[(fault == kSameOutput ? 0 : row) + (fault == kPastGlobal ? rows : 0)] = *total;
}

}  // namespace himo::cuda

int main(int count, char** arguments) {
  using namespace himo::cuda;
  const Fault fault = static_cast<Fault>(count > 1 ? std::atoi(arguments[1]) : 0);
  if (count > 2) himo::emulate::order_seed = std::atoi(arguments[2]);
  const int rows = 3, n = 1000;
  std::vector<float> x(rows * n), out(rows, NAN);
  for (int i = 0; i < rows * n; ++i) x[i] = static_cast<float>(i % 17);  // sums are exact
  float* result = out.data();
  HIMO_LAUNCH(row_sums, rows, kThreads, 128, nullptr, x.data(), result, n, rows, fault);
  for (int row = 0; row < rows; ++row) {
    float sum = 0;
    for (int i = 0; i < n; ++i) sum += x[row * n + i];
    if (!(out[row] == sum)) {
      std::fprintf(stderr, "wrong sum of row %d: %f\n", row, out[row]);
      return 1;
    }
  }
}
