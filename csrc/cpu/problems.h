// The loop over the independent problems of a batch.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <algorithm>
#include <cstdint>

#include "common/interrupt.h"

namespace himo::cpu {

// A thread takes up problems of this much work at least: a fork costs about 10 us.
constexpr double kForkFlops = 1e5;
// A problem from which on all threads share the BLAS and LAPACK calls of one with profit.
constexpr double kSharedFlops = 1e7;

// Calls body(b, workspace) for the problems 0 to batch, of this many FLOPs each, with a Workspace
// of each thread's own. Threads take whole problems, in which BLAS and LAPACK then run on one
// thread; large problems that are left over when every thread has as many, a single one above all,
// are solved one by one on all threads. Ctrl-C ends the call between problems. The cut depends on
// the shape and the number of threads alone.
template <typename Workspace, typename Body>
void for_each_problem(int64_t batch, double flops, const Body& body) {
  Interrupt interrupt;
  const auto run = [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView no_autograd;  // a worker has none of the caller's
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
