// The loops of InfoNCE, both directions at once. Logits exist a tile at a time.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace himo::cpu {

// One problem of N pairs: S = scale query key^T. K is the inner dimension. Tensors of results are
// allocated by the caller; acc is float, or double for double features.
struct InfoNCE {
  at::Tensor query;       // [N, K], any strides
  at::Tensor key;         // [N, K], any strides, dtype of query
  at::Tensor positives;   // [N] acc: S_ii, written forward
  at::Tensor row_nll;     // [N] acc, contiguous: written forward, read backward
  at::Tensor column_nll;  // [N] acc, contiguous
  at::Tensor products;    // [N, N] acc: query key^T, kept from forward to backward; or undefined
  // Backward only.
  double weight = 0;      // dL/dloss / (2 N)
  at::Tensor grad_query;  // [N, K] acc, contiguous, or undefined where it is not needed
  at::Tensor grad_key;    // [N, K] acc, likewise
};

struct InfoNCEOptions {
  double scale;
  double label_smoothing;
  bool differentiate_keys;
};

// Problems of one N, dtype and set of defined tensors.
void info_nce_statistics(const std::vector<InfoNCE>& problems, double scale);
// Returns the gradient of scale, summed over the problems.
double info_nce_gradients(const std::vector<InfoNCE>& problems, const InfoNCEOptions& options);

}  // namespace himo::cpu
