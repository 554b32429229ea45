// Whether a call is plain: nothing observes or transforms what it does.
// See Operator.plain in himo_kernels/dispatch.py. The answer may be no where it could be yes.
#pragma once

#include <ATen/core/Tensor.h>

namespace himo {

// Whether matmuls on the CPU are full float32, because the user allows no less.
bool has_full_float32();

// Whether this thread has no mode, transform, trace, autocast, profiler or other callback.
bool is_plain_thread();

// Whether x is a dense CPU tensor of a dtype that features may have, and wraps no other tensor.
bool is_plain(const at::Tensor& x);

}  // namespace himo
