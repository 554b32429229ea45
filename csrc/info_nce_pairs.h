// Entry points of InfoNCE of any pairs on the CPU: argument checks and allocation. They compute
// what himo_kernels/info_nce/pairs/compose.py asks of a backend.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace himo {

// A side, rows or columns, is a list: keys [*, n] int32; for losses also single [*, n] int32, and
// reference, target and share [*, n]; in the backward also log and weight [*, n].
using PairSideTensors = std::vector<at::Tensor>;

// Returns x_i . y_k with k = places_i [*, N]: float32, or float64 for float64 features.
at::Tensor row_products(const at::Tensor& x,        // [*, N, D]
                        const at::Tensor& y,        // [*, M, D]
                        const at::Tensor& places);  // [*, N] int64 in [0, M)

// Returns log and total of the rows [*, N], and of the columns [*, M] if they have losses. Writes
// query key^T into products [*, N, M] if given: contiguous, float32, or float64 for float64
// features.
std::vector<at::Tensor> info_nce_pairs_fwd(const at::Tensor& query,        // [*, N, K]
                                           const at::Tensor& key,          // [*, M, K]
                                           const at::Tensor& logit_scale,  // []
                                           const PairSideTensors& rows,
                                           const PairSideTensors& columns,
                                           const std::optional<at::Tensor>& row_labels,
                                           const std::optional<at::Tensor>& column_labels,
                                           bool exclude_self, double label_smoothing,
                                           const std::optional<at::Tensor>& products);

// Returns the gradients of query and key, empty if not needed, and of logit_scale [], float32 or
// float64; of bfloat16 query and key in bfloat16 if the machine multiplies it. products is the
// tensor that the forward wrote; without it the products are recomputed.
std::tuple<at::Tensor, at::Tensor, at::Tensor> info_nce_pairs_bwd(
    const at::Tensor& query,        // [*, N, K]
    const at::Tensor& key,          // [*, M, K]
    const at::Tensor& logit_scale,  // []
    const PairSideTensors& rows, const PairSideTensors& columns,
    const std::optional<at::Tensor>& row_labels, const std::optional<at::Tensor>& column_labels,
    bool exclude_self, double label_smoothing, const std::optional<at::Tensor>& products,
    bool needs_query, bool needs_key);

}  // namespace himo
