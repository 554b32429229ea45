// Whether a call is plain: nothing observes or transforms what it does.
// See Operator.plain in himo_kernels/dispatch.py. The answer may be no where it could be yes.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/stack.h>

#include <variant>
#include <vector>

namespace himo {

// Whether matmuls on the CPU are full float32, because the user allows no less.
bool has_full_float32();

// Whether this thread has no mode, transform, trace, autocast, profiler or other callback.
bool is_plain_thread();

// Whether x is a dense CPU tensor that wraps no other tensor.
bool is_dense(const at::Tensor& x);

// Whether x is dense and of a dtype that features may have.
bool is_plain(const at::Tensor& x);
bool are_plain(const std::vector<at::Tensor>& tensors);

// Whether these are the features [*, N, D] of a plain call: plain, alike and with entries.
bool are_plain_features(const std::vector<at::Tensor>& features);

// The scale of a plain call as a tensor [], a number in this dtype; undefined if it is not valid.
at::Tensor plain_scale(const std::variant<at::Tensor, double>& logit_scale, at::ScalarType dtype);

// Whether autograd records a call with these inputs.
bool needs_gradient(const std::vector<at::Tensor>& features, const at::Tensor& logit_scale);

// Whether a tensor of this shape and dtype takes at most this many bytes.
bool is_small(at::IntArrayRef shape, at::ScalarType dtype, int64_t most_bytes);

// Raises in a backward that autograd records.
void refuse_double_backward(const char* op);

// Calls an operator as Python does, so that whatever observes or transforms the call sees it.
std::vector<at::Tensor> call_operator(const char* name, torch::jit::Stack arguments);

}  // namespace himo
