// Parallel loop over the independent problems of a batch.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <algorithm>
#include <cstdint>

#include "common/interrupt.h"

namespace himo::cpu {

// Minimum work per thread: forking costs about 10 us.
constexpr double kForkFlops = 1e5;
// From this size on, one problem gains from BLAS and LAPACK calls that use all threads.
constexpr double kSharedFlops = 1e7;

// Calls body(b, workspace) for every problem b in [0, batch), of `flops` FLOPs each, with one
// Workspace per thread. Each thread solves whole problems, with single-threaded BLAS and LAPACK
// calls. Large problems that do not divide evenly among the threads (such as a single problem) are
// solved one after the other, each on all threads. Ctrl-C ends the call between problems. The
// split depends only on the shape and the number of threads.
template <typename Workspace, typename Body>
void for_each_problem(int64_t batch, double flops, const Body& body) {
  Interrupt interrupt;
  const auto run = [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView no_autograd;  // workers do not inherit the caller's
    Workspace workspace;
    for (int64_t b = begin; b < end && !interrupt.poll(); ++b) body(b, workspace);
  };
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  const int64_t left_over = flops >= kSharedFlops ? batch % threads : batch == 1 ? 1 : 0;
  const int64_t together = batch - left_over;
  at::parallel_for(0, together, static_cast<int64_t>(std::max(1.0, kForkFlops / flops)), run);
  run(together, batch);
}

}  // namespace himo::cpu
