// The loops of InfoNCE, both directions at once. Logits exist a tile at a time.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace himo::cpu {

// S = scale query key^T, in which row i and column i + offset are a pair: all pairs of one batch
// (M = N, offset 0), or a block of a batch that other processes hold the rest of. K is the inner
// dimension. Tensors of results are allocated by the caller; acc is float, or double for double
// features.
struct InfoNCE {
  at::Tensor query;  // [M, K], any strides
  at::Tensor key;    // [N, K], any strides, dtype of query
  int64_t offset = 0;
  // S of each row's and each column's pair, which may be in another block. Undefined: of a batch,
  // whose forward writes them to positives.
  at::Tensor row_positives;     // [M] acc
  at::Tensor column_positives;  // [N] acc
  at::Tensor positives;         // [N] acc
  // Written forward, read backward, where they are of the whole batch. The forward of a block
  // writes log sum exp(S - positive) of what is no pair.
  at::Tensor row_nll;     // [M] acc, contiguous
  at::Tensor column_nll;  // [N] acc, contiguous
  at::Tensor products;    // [M, N] acc: query key^T, kept from forward to backward; or undefined
  // Backward only.
  at::Tensor row_weight;     // [M] acc, contiguous: dL/d of each nll
  at::Tensor column_weight;  // [N] acc
  at::Tensor grad_query;     // [M, K] acc, contiguous, or undefined where it is not needed
  at::Tensor grad_key;       // [N, K] acc, likewise
};

struct InfoNCEOptions {
  double scale;
  double label_smoothing;
  bool differentiate_keys;
  int64_t total;      // samples of the whole batch
  double factor;      // of the gradients of query and key: scale, or 1 for a caller that multiplies
  bool add_to_query;  // grad_query holds another loss's, and is not written but added to
};

// Problems of one shape, dtype and set of defined tensors.
void info_nce_statistics(const std::vector<InfoNCE>& problems, double scale);
// Returns the gradient of scale, summed over the problems.
double info_nce_gradients(const std::vector<InfoNCE>& problems, const InfoNCEOptions& options);

}  // namespace himo::cpu
