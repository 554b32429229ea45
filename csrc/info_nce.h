// Entry points of InfoNCE on the CPU: argument checks and allocation. One loss at a time; the dual
// forms are two calls (himo_kernels/info_nce/cpu.py).
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace himo {

// Returns loss [*], and nll of the rows and of the columns of S [*, N]; float32, or float64 for
// float64 features. Writes query key^T into products where it is defined.
std::tuple<at::Tensor, at::Tensor, at::Tensor> info_nce_fwd(
    const at::Tensor& query,        // [*, N, K]
    const at::Tensor& key,          // [*, N, K]
    const at::Tensor& logit_scale,  // []
    double label_smoothing,
    const std::optional<at::Tensor>& products);  // [*, N, N] contiguous, dtype of the results

// Returns the gradients of query and key [*, N, K] and of logit_scale [], float32 or float64 as
// above; empty ones where they are not needed. products is what the forward
// wrote, or nothing: then the products are formed again.
std::tuple<at::Tensor, at::Tensor, at::Tensor> info_nce_bwd(
    const at::Tensor& grad_loss,    // [*]
    const at::Tensor& query,        // [*, N, K]
    const at::Tensor& key,          // [*, N, K]
    const at::Tensor& logit_scale,  // []
    const at::Tensor& row_nll,      // [*, N]
    const at::Tensor& column_nll,   // [*, N]
    double label_smoothing, bool differentiate_keys, bool needs_query, bool needs_key,
    const std::optional<at::Tensor>& products);  // [*, N, N]

}  // namespace himo
