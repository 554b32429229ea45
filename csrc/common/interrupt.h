// Ctrl-C inside a long call: Python's signal handlers run between pieces of work, and what they
// raise ends the call.
#pragma once

#include <chrono>

namespace himo {

// Runs Python's pending signal handlers; throws what they raise, KeyboardInterrupt as a rule. Takes
// the GIL, which the caller must not hold; does nothing on a thread other than Python's main one.
void check_interrupt();

// Calls check_interrupt at most every 50 ms: taking the GIL may wait 5 ms for another thread.
class InterruptPoll {
 public:
  void operator()() {
    const auto now = Clock::now();
    if (now - last_ < std::chrono::milliseconds(50)) return;
    last_ = now;
    check_interrupt();
  }

 private:
  using Clock = std::chrono::steady_clock;
  Clock::time_point last_ = Clock::now();
};

}  // namespace himo
