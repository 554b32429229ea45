// Entry points of InfoNCE on the CPU: argument checks and allocation. One loss at a time; the dual
// forms are two calls (himo_kernels/info_nce/compose.py).
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
// above; empty ones where they are not needed. products is what the forward wrote, or nothing: then
// the products are formed again. query_sum, in the dtype of the gradients and contiguous, has the
// query's added to it and is returned in its place; given only where that is needed.
std::tuple<at::Tensor, at::Tensor, at::Tensor> info_nce_bwd(
    const at::Tensor& grad_loss,    // [*]
    const at::Tensor& query,        // [*, N, K]
    const at::Tensor& key,          // [*, N, K]
    const at::Tensor& logit_scale,  // []
    const at::Tensor& row_nll,      // [*, N]
    const at::Tensor& column_nll,   // [*, N]
    double label_smoothing, bool differentiate_keys, bool needs_query, bool needs_key,
    const std::optional<at::Tensor>& products,    // [*, N, N]
    const std::optional<at::Tensor>& query_sum);  // [*, N, K]

// A block of the logits of a larger batch: rows [M, K] against keys [N, K], of which row i and
// column i + offset are a pair where there is such a column. Positives are S of each row's and each
// column's own pair, wherever that is. Returns log sum exp(S - positive) of each row [M] and column
// [N], the pairs left out.
std::tuple<at::Tensor, at::Tensor> info_nce_block_fwd(const at::Tensor& query,             // [M, K]
                                                      const at::Tensor& key,               // [N, K]
                                                      const at::Tensor& logit_scale,       // []
                                                      const at::Tensor& row_positives,     // [M]
                                                      const at::Tensor& column_positives,  // [N]
                                                      int64_t offset);

// Returns the gradients of query [M, K] and key [N, K] without the factor scale. nlls are those of
// the whole batch of `total` samples, weights the gradients of each nll.
std::tuple<at::Tensor, at::Tensor> info_nce_block_bwd(const at::Tensor& query,             // [M, K]
                                                      const at::Tensor& key,               // [N, K]
                                                      const at::Tensor& logit_scale,       // []
                                                      const at::Tensor& row_positives,     // [M]
                                                      const at::Tensor& row_nll,           // [M]
                                                      const at::Tensor& row_weight,        // [M]
                                                      const at::Tensor& column_positives,  // [N]
                                                      const at::Tensor& column_nll,        // [N]
                                                      const at::Tensor& column_weight,     // [N]
                                                      int64_t offset, double label_smoothing,
                                                      int64_t total, bool differentiate_keys);

}  // namespace himo
