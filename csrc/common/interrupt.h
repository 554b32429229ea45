// Ctrl-C inside a long call. Python runs a signal's handler only when it gets control back, which a
// call of minutes does not give it; so the calling thread asks between pieces of work.
#pragma once

#include <atomic>
#include <chrono>

namespace himo {

// One for each call, shared by its threads. The caller must not hold the GIL.
class Interrupt {
 public:
  // release: called in the calling thread before handlers run, gives back what it holds of the
  // processor's state, which a handler's own products may need.
  explicit Interrupt(void (*release)() = [] {}) : release_(release) {}

  // Returns whether the work is to stop. In the calling thread, at most every 50 ms (taking the GIL
  // may wait 5 ms for another thread), runs Python's pending signal handlers and throws what they
  // raise, KeyboardInterrupt as a rule. On a thread other than Python's main one none is pending.
  bool poll();

 private:
  using Clock = std::chrono::steady_clock;
  void (*release_)();
  std::atomic<bool> stopped_{false};
  Clock::time_point last_ = Clock::now();
};

}  // namespace himo
