// Entry point of the sigmoid loss on the CPU: argument checks and allocation.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace himo {

// Returns the sum of the losses of all pairs over `divisor` [*], and its gradients of query
// [*, M, K], key [*, N, K], logit_scale [*] and logit_bias [*] for each problem; float32, or
// float64 for float64 features. Gradients of features are empty if not needed. needs_scalars says
// whether the gradient of logit_scale or logit_bias is needed. Row i and column i + offset are the
// positive pairs: 0 and M = N for a whole batch; any offset for a block of a larger batch.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> sigmoid_loss_fwd(
    const at::Tensor& query,        // [*, M, K]
    const at::Tensor& key,          // [*, N, K]
    const at::Tensor& logit_scale,  // []
    const at::Tensor& logit_bias,   // []
    int64_t offset, double divisor, bool needs_query, bool needs_key, bool needs_scalars);

}  // namespace himo
