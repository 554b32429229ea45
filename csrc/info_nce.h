// Entry points of InfoNCE on the CPU: argument checks and allocation. A call computes one loss; the
// dual forms make two calls (himo_kernels/info_nce/compose.py).
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <variant>
#include <vector>

namespace himo {

// Returns loss [*], and nll of the rows and of the columns of S [*, N]; float32, or float64 for
// float64 features. Writes query key^T into products if given.
std::tuple<at::Tensor, at::Tensor, at::Tensor> info_nce_fwd(
    const at::Tensor& query,        // [*, N, K]
    const at::Tensor& key,          // [*, N, K]
    const at::Tensor& logit_scale,  // []
    double label_smoothing,
    const std::optional<at::Tensor>& products);  // [*, N, N] contiguous, dtype of the results

// Returns the loss [*] of the first features against each of the others, in the dtype of above.
// Returns nothing if the call is not plain (common/plain.h) or an argument not valid: the caller
// then finds out why. Likewise if a gradient is needed whose cache of logits would take more than
// most_cached bytes.
std::optional<std::vector<at::Tensor>> info_nce_plain(
    const std::vector<at::Tensor>& features,              // [*, N, K] each
    const std::variant<at::Tensor, double>& logit_scale,  // of one element
    double label_smoothing, bool differentiate_keys, int64_t most_cached);

// Returns the gradients of query and key [*, N, K] and of logit_scale [], float32 or float64 as
// above; empty if not needed. products is the tensor that the forward wrote; without it the
// products are recomputed. If query_sum is given (contiguous, dtype of the gradients), the gradient
// of query is added to it in place and query_sum is returned; give it only with needs_query.
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

// Writes query key^T, with the bits that info_nce_fwd writes. The problems that are `exact`, one
// flag for each, are summed in short parts instead, which rounds less.
void info_nce_products(const at::Tensor& query, const at::Tensor& key,  // [*, N, K]
                       const at::Tensor& products,                      // [*, N, N] contiguous, acc
                       const std::vector<bool>& exact);

// info_nce_fwd of products that are given. Query and key give the mean logit of label smoothing.
std::tuple<at::Tensor, at::Tensor, at::Tensor> info_nce_fwd_of_products(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& logit_scale,
    double label_smoothing, const at::Tensor& products);  // [*, N, N] contiguous, acc

// The gradient of the products by another loss, which is added to that of info_nce.
struct OtherLoss {
  at::Tensor for_query;  // [*, N, N] contiguous, acc: for the gradient of query
  at::Tensor for_key;    // [*, N, N] likewise; undefined if it is for_query
  at::Tensor row_sums;   // [*, N] float64, 0: receives s dS of info_nce, summed over the keys
};

// info_nce_bwd with another loss. If products are given, the gradient of query may be wanted for
// other keys than those of the products.
std::tuple<at::Tensor, at::Tensor, at::Tensor> info_nce_bwd_with(
    const OtherLoss& other, const at::Tensor& grad_loss, const at::Tensor& query,
    const at::Tensor& key, const at::Tensor& logit_scale, const at::Tensor& row_nll,
    const at::Tensor& column_nll, double label_smoothing, bool differentiate_keys, bool needs_query,
    bool needs_key, const std::optional<at::Tensor>& products,
    const std::optional<at::Tensor>& query_sum);

// A block of the logits of a larger batch: query [M, K] against key [N, K]. Row i and column
// i + offset are a pair, if there is such a column. The positives are S of the pair of each row and
// of each column, inside or outside this block. Returns log sum exp(S - positive) over the
// negatives of each row [M] and of each column [N].
std::tuple<at::Tensor, at::Tensor> info_nce_block_fwd(const at::Tensor& query,             // [M, K]
                                                      const at::Tensor& key,               // [N, K]
                                                      const at::Tensor& logit_scale,       // []
                                                      const at::Tensor& row_positives,     // [M]
                                                      const at::Tensor& column_positives,  // [N]
                                                      int64_t offset);

// Returns the gradients of query [M, K] and key [N, K] without the factor scale. The nlls are over
// the whole batch of `total` samples; the weights are the gradients of the nlls.
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
