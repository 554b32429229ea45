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
// Work of one thread between two looks at pending signals: about 20 ms.
constexpr double kRoundFlops = 5e8;
// A problem from which on all threads can share the BLAS and LAPACK calls of one.
constexpr double kSharedFlops = 1e7;

// Calls body(begin, end) over the problems 0 to batch, of this many FLOPs each. Threads take whole
// problems, in which BLAS and LAPACK then run on one thread; large problems that are left over when
// every thread has as many, a single one above all, are solved one by one on all threads.
// Interruptible between problems. The cut depends on the shape and the number of threads alone.
template <typename Body>
void for_each_problem(int64_t batch, double flops, const Body& body) {
  const auto run = [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView no_autograd;  // a worker has none of the caller's
    body(begin, end);
  };
  const auto at_least_one = [&](double total) {
    return static_cast<int64_t>(std::clamp(total / flops, 1.0, 1e9));
  };
  Interrupt interrupt;
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  const int64_t left_over = flops >= kSharedFlops ? batch % threads : batch == 1 ? 1 : 0;
  const int64_t together = batch - left_over, round = threads * at_least_one(kRoundFlops);
  for (int64_t b = 0; b < together; b += round) {
    at::parallel_for(b, std::min(b + round, together), at_least_one(kForkFlops), run);
    interrupt.poll();
  }
  for (int64_t b = together; b < batch; ++b) {
    run(b, b + 1);
    interrupt.poll();
  }
}

}  // namespace himo::cpu
