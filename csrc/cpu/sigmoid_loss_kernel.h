// The sigmoid loss and its gradients in one pass over tiles of the logits: the gradient needs no
// statistics of rows or columns.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "cpu/logit_products.h"
#include "cpu/tile_loops.h"

namespace himo::cpu {

struct SigmoidOptions {
  double scale, bias;
  int64_t offset;  // row i and column i + offset are the positive pairs
  double divisor;  // of the losses and of all gradients
  bool gradients;  // whether any gradient is needed
};

// Returns for each problem its loss, and the gradients of scale and bias. Writes the gradients of
// query and key where these tensors are defined. All problems have the same shape, dtype and set of
// defined tensors.
std::vector<SigmoidSums> sigmoid_loss(const std::vector<Logits>& problems,
                                      const SigmoidOptions& options);

}  // namespace himo::cpu
