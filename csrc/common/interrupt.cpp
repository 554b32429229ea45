#include "common/interrupt.h"

#include <pybind11/pybind11.h>

namespace himo {

void check_interrupt() {
  const pybind11::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw pybind11::error_already_set();
}

}  // namespace himo
