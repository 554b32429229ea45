// Ctrl-C inside a long kernel. Python runs a signal's handler only when it gets control back, and a
// kernel of minutes does not give it; so the calling thread asks between blocks of work.
#pragma once

#include <pybind11/pybind11.h>

#include <atomic>
#include <chrono>

#include <ATen/Parallel.h>

namespace himo {

// One for each kernel call, shared by its threads. The GIL is free while a kernel runs.
class Interrupt {
 public:
  // Returns whether the work is to stop. In the calling thread, at most every 50 ms, lets Python
  // run its signal handlers, and throws what one raised.
  bool poll() {
    if (at::get_thread_num() != 0) return stopped_.load(std::memory_order_relaxed);
    const auto now = std::chrono::steady_clock::now();
    if (now - last_ < std::chrono::milliseconds(50)) return false;
    last_ = now;
    const pybind11::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() == 0) return false;
    stopped_.store(true, std::memory_order_relaxed);
    throw pybind11::error_already_set();
  }

 private:
  std::atomic<bool> stopped_{false};
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

}  // namespace himo
