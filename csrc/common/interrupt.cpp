#include "common/interrupt.h"

#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>

namespace himo {

bool Interrupt::poll() {
  if (at::get_thread_num() != 0) return stopped_.load(std::memory_order_relaxed);
  const auto now = Clock::now();
  if (now - last_ < std::chrono::milliseconds(50)) return false;
  last_ = now;
  release_();
  const pybind11::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() == 0) return false;
  stopped_.store(true, std::memory_order_relaxed);
  throw pybind11::error_already_set();
}

}  // namespace himo
