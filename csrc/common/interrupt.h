// Ctrl-C inside a long call. Python runs signal handlers only when control returns to it, which may
// take minutes here, so the calling thread polls for signals between pieces of work.
#pragma once

#include <atomic>
#include <chrono>

namespace himo {

// One object per call, shared by its threads. The caller must not hold the GIL.
class Interrupt {
 public:
  // release: called in the calling thread before handlers run. It releases processor state (AMX
  // tiles) that matrix products inside a handler may need.
  explicit Interrupt(void (*release)() = [] {}) : release_(release) {}

  // Returns whether to stop. In the calling thread, at most every 50 ms (taking the GIL may wait 5
  // ms for another thread), it runs Python's pending signal handlers and throws what they raise,
  // usually KeyboardInterrupt. Python runs handlers only on its main thread.
  bool poll();

 private:
  using Clock = std::chrono::steady_clock;
  void (*release_)();
  std::atomic<bool> stopped_{false};
  Clock::time_point last_ = Clock::now();
};

}  // namespace himo
