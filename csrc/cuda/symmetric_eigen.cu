// One block solves one matrix of side n <= 128, in float64. The matrix stays in registers until it
// is tridiagonal, its eigenvectors in shared memory. himo_kernels/pca/README.md has the steps'
// latencies.

#include "cuda/symmetric_eigen.h"

#include "cuda/bisection.cuh"
#include "cuda/device.cuh"
#include "cuda/inverse_iteration.cuh"
#include "cuda/orthonormal.cuh"
#include "cuda/tridiagonal.cuh"

namespace himo::cuda {
namespace {

// Eigenvalues closer than this, relative to the bound of the spectrum, form a cluster: the error of
// |Z Z^T - I| between others is some eps / kCluster, which one Newton-Schulz step squares.
constexpr double kCluster = 0x1p-20;
// Largest accepted |Z Z^T - I| before that step, whose square is below n eps.
constexpr double kOrthogonal = 0x1p-30;
// Largest accepted |T z - lambda z| by n eps and the bound of the spectrum.
constexpr double kResidual = 16;

struct Arguments {
  const double* matrices;
  double *eigenvalues, *vectors;
  int64_t* rank;
  int* certified;
  double* work;
  const double *threshold, *shifts;
  double relative, absolute;
  int n;
};

template <int SIDE>
__host__ __device__ constexpr int64_t work_of() {
  return (1 + Elimination<SIDE>::kPlanes) * SIDE * SIDE;  // reflectors and elimination
}

// Arrays of shared memory, in the order in which they are laid out.
template <int SIDE>
struct Arrays {
  double *z, *panel, *diagonal, *off_diagonal, *factors, *eigenvalues;
  SturmRow* sturm;
  int *counts, *last_of_cluster;
  unsigned char* swaps;
  double* partial;  // [2, kWarps]

  __device__ explicit Arrays(SharedMemory& shared)
      : z(shared.array<double>(SIDE * Layout<SIDE>::kStride)),
        panel(shared.array<double>(SIDE * kPanelStride)),
        diagonal(shared.array<double>(SIDE)),
        off_diagonal(shared.array<double>(SIDE)),
        factors(shared.array<double>(SIDE)),
        eigenvalues(shared.array<double>(SIDE)),
        sturm(shared.array<SturmRow>(SIDE)),
        counts(shared.array<int>(kThreads)),
        last_of_cluster(shared.array<int>(SIDE)),
        swaps(shared.array<unsigned char>(SIDE * SIDE)),
        partial(shared.array<double>(2 * kWarps)) {}

  static constexpr size_t kBytes =
      sizeof(double) * (SIDE * (Layout<SIDE>::kStride + kPanelStride + 4) + 2 * kWarps) +
      sizeof(SturmRow) * SIDE + sizeof(int) * (kThreads + SIDE) + SIDE * SIDE +
      sizeof(double) * 6 * SIDE;  // Messages
};

// Returns the largest x of the block, in every thread. NaN counts as larger than all. partial is
// [kWarps]; the next use of it needs a barrier before.
__device__ inline double largest_of_block(double x, double* partial) {
  const bool nan = __ballot_sync(kAllLanes, x != x) != 0;
  x = largest_of_warp(x);
  if (threadIdx.x % kLanes == 0) partial[threadIdx.x / kLanes] = nan ? NAN : x;
  __syncthreads();
  double largest = 0;
  HIMO_UNROLL
  for (int i = 0; i < kWarps; ++i) {
    if (!(partial[i] <= largest) && largest == largest) largest = partial[i];
  }
  return largest;
}

// The vectors to compute: columns [first, first + count).
struct Range {
  int rank, first, count;
};

// All warps compute the same: lane l has the eigenvalues from l SIDE / 32 on.
template <int SIDE>
__device__ inline Range choose(const double* eigenvalues, double scale, const Arguments& given,
                               int64_t problem) {
  constexpr int kEach = SIDE / kLanes;
  if (!given.threshold) return {given.n, 0, given.n};
  const int lane = threadIdx.x % kLanes;
  double sums[kEach], total = 0;
  HIMO_UNROLL
  for (int i = 0; i < kEach; ++i) {
    const int j = lane * kEach + i;
    const double value = j < given.n ? eigenvalues[j] : 0.0;
    sums[i] = total += value > 0 ? value : 0.0;
  }
  double before = total;
  HIMO_UNROLL
  for (int distance = 1; distance < kLanes; distance *= 2) {
    const double left = __shfl_up_sync(kAllLanes, before, distance);
    if (lane >= distance) before += left;
  }
  // The same sum as the last of `sums`, so that its share is exactly 1 and reaches a threshold
  // of 1.
  const double sum = __shfl_sync(kAllLanes, before - total + sums[kEach - 1], kLanes - 1);
  int rank = 1;
  HIMO_UNROLL
  for (int i = 0; i < kEach; ++i) {
    const bool is_short = (before - total + sums[i]) / sum < *given.threshold;
    rank += __popc(__ballot_sync(kAllLanes, is_short && lane * kEach + i < given.n));
  }
  const double variance = sum * scale, shift = given.shifts ? given.shifts[problem] : 0.0;
  if (!(variance > given.relative * (variance + shift) + given.absolute)) rank = given.n;
  if (2 * rank < given.n) return {rank, 0, rank};
  return {rank, rank, given.n - rank};
}

// |T| <= the bound by Gershgorin. Writes what the counts read and returns the bound; a barrier
// follows before it is read.
template <int SIDE>
__device__ inline double bound_of(const Arrays<SIDE>& arrays, int n) {
  const int i = threadIdx.x;
  double radius = 0, before = 0;
  if (i < n) {
    before = i > 0 ? arrays.off_diagonal[i - 1] : 0.0;
    radius = fabs(arrays.diagonal[i]) + fabs(before) + fabs(arrays.off_diagonal[i]);
  }
  const double bound = fmax(largest_of_block(radius, arrays.partial) * (1 + 8 * kEps), 1.0);
  if (i < SIDE) {
    // An element of 2^-60 is below the rounding of T, whose largest is near 1.
    arrays.sturm[i] = {i < n ? arrays.diagonal[i] : 2 * bound, fmax(before * before, 0x1p-120)};
  }
  return bound;
}

template <int SIDE>
__device__ inline void fill(double* out, int count, double value) {
  for (int i = threadIdx.x; i < count; i += kThreads) out[i] = value;
}

// Writes for each vector of the range the last one of its cluster. A barrier follows
// before it is read.
__device__ inline void find_clusters(const double* eigenvalues, int count, double gap, int* last) {
  const int i = threadIdx.x;
  if (i < count) {
    int end = i;
    while (end + 1 < count && eigenvalues[end] - eigenvalues[end + 1] < gap) ++end;
    last[i] = end;
  }
}

template <int SIDE>
__global__ void __launch_bounds__(kThreads, 1) symmetric_eigen_kernel(Arguments given) {
  const int64_t problem = blockIdx.x;
  const int n = given.n, warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const double* matrix = given.matrices + problem * n * n;
  double* reflectors = given.work + problem * work_of<SIDE>();
  SharedMemory shared;
  const Arrays<SIDE> arrays(shared);
  const Messages<SIDE> messages(shared);

  double a[Layout<SIDE>::kRows][Layout<SIDE>::kColumns], largest = 0;
  HIMO_UNROLL
  for (int q = 0; q < Layout<SIDE>::kRows; ++q) {
    HIMO_UNROLL
    for (int c = 0; c < Layout<SIDE>::kColumns; ++c) {
      const int i = warp + kWarps * q, j = lane + kLanes * c;
      a[q][c] = i < n && j < n ? matrix[i * n + j] : 0.0;
      if (!(fabs(a[q][c]) <= largest) && largest == largest) largest = fabs(a[q][c]);
    }
  }
  largest = largest_of_block(largest, arrays.partial);
  if (!(largest < INFINITY)) {
    fill<SIDE>(given.eigenvalues + problem * n, n, NAN);
    fill<SIDE>(given.vectors + problem * n * n, n * n, NAN);
    if (threadIdx.x == 0) {
      given.rank[problem] = n;
      given.certified[problem] = 0;
    }
    return;
  }
  // Divided by a power of two, at least the smallest normal number, so that elements are near 1 and
  // squares in range.
  const int exponent = high_word(largest) & 0x7ff00000;
  const double scale = from_high_word(exponent > 0x00100000 ? exponent : 0x00100000);
  HIMO_UNROLL
  for (int q = 0; q < Layout<SIDE>::kRows; ++q) {
    HIMO_UNROLL
    for (int c = 0; c < Layout<SIDE>::kColumns; ++c) a[q][c] *= 1.0 / scale;
  }

  tridiagonalise<SIDE>(a, messages, n, arrays.diagonal, arrays.off_diagonal, arrays.factors,
                       reflectors);
  const double bound = bound_of(arrays, n);
  __syncthreads();
  bisect<SIDE>(arrays.sturm, n, bound, arrays.counts, arrays.eigenvalues);
  for (int i = threadIdx.x; i < n; i += kThreads)
    given.eigenvalues[problem * n + i] = arrays.eigenvalues[i] * scale;
  // Of a matrix of zeros, bisection leaves eigenvalues of a few smallest numbers.
  const double scale_or_zero = largest > 0 ? scale : 0.0;
  const Range range = choose<SIDE>(arrays.eigenvalues, scale_or_zero, given, problem);
  const double* wanted = arrays.eigenvalues + range.first;
  find_clusters(wanted, range.count, kCluster * bound, arrays.last_of_cluster);

  iterate<SIDE>({reflectors + SIDE * SIDE, arrays.swaps}, arrays.diagonal, arrays.off_diagonal,
                wanted, arrays.last_of_cluster, range.count, n, arrays.z);
  const double skew = newton_schulz<SIDE>(arrays.z, arrays.panel, range.count, n);
  const double residual = largest_residual<SIDE>(arrays.z, arrays.diagonal, arrays.off_diagonal,
                                                 wanted, range.count, n);
  const double worst = fmax(skew / kOrthogonal, residual / (kResidual * kEps * n * bound));
  const bool certified = largest_of_block(worst, arrays.partial + kWarps) <= 1;
  back_transform<SIDE>(arrays.z, reflectors, arrays.factors, range.first, range.count, n,
                       given.vectors + problem * n * n);
  if (threadIdx.x == 0) {
    given.rank[problem] = range.rank;
    given.certified[problem] = certified;
  }
}

template <int SIDE>
int start(const Arguments& given, int64_t problems, cudaStream_t stream) {
  constexpr size_t kBytes = Arrays<SIDE>::kBytes;
  const cudaError_t error = cudaFuncSetAttribute(
      symmetric_eigen_kernel<SIDE>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  HIMO_LAUNCH(symmetric_eigen_kernel<SIDE>, problems, kThreads, kBytes, stream, given);
  return cudaGetLastError();
}

}  // namespace
}  // namespace himo::cuda

int64_t himo_cuda_symmetric_eigen_work(int n) {
  using namespace himo::cuda;
  return n <= 32 ? work_of<32>() : n <= 64 ? work_of<64>() : work_of<128>();
}

int himo_cuda_symmetric_eigen(const double* matrices, double* eigenvalues, double* vectors,
                              int64_t* rank, int* certified, double* work, const double* threshold,
                              const double* shifts, double relative, double absolute,
                              int64_t problems, int n, void* stream) {
  using namespace himo::cuda;
  if (n < 1 || n > himo_cuda_largest_side || problems < 0 || problems > INT32_MAX)
    return cudaErrorInvalidValue;
  if (problems == 0) return cudaSuccess;
  const Arguments given{matrices,  eigenvalues, vectors,  rank,     certified, work,
                        threshold, shifts,      relative, absolute, n};
  const auto on = static_cast<cudaStream_t>(stream);
  if (n <= 32) return start<32>(given, problems, on);
  return n <= 64 ? start<64>(given, problems, on) : start<128>(given, problems, on);
}
