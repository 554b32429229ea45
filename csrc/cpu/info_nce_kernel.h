// InfoNCE in both directions, forward and backward, without materialising the logits: only one
// tile per thread exists at a time.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "cpu/logit_products.h"

namespace himo::cpu {

// What decides about the pairs of the rows, or of the columns, if any pairs may be positive; and
// what their losses need. See himo_kernels/info_nce/pairs/compose.py.
struct InfoNCESide {
  at::Tensor keys;    // [n] int
  at::Tensor labels;  // [n] int; or undefined
  // Undefined for columns without losses.
  at::Tensor single;  // [n] int
  at::Tensor target;  // [n] acc
  at::Tensor share;   // [n] acc
  at::Tensor total;   // [n] acc, contiguous: written by the forward
};

// S = scale query key^T. Row i and column i + offset are a positive pair. The problem is either a
// whole batch (M = N, offset 0) or one block of a batch whose other rows and columns are on other
// processes. K is the inner dimension. The caller allocates the outputs.
struct InfoNCE : Logits {
  int64_t offset = 0;
  // Blocks only: S of each row's and each column's positive pair, which may be in another block.
  // Undefined for a whole batch, whose forward writes them to positives.
  at::Tensor row_positives;     // [M] acc
  at::Tensor column_positives;  // [N] acc
  at::Tensor positives;         // [N] acc, contiguous
  // Whole batch: written by the forward, read by the backward. The forward of a block instead
  // writes log sum exp(S - positive) over the entries of the block that are not positive pairs;
  // its backward reads the nll of the whole batch.
  at::Tensor row_nll;     // [M] acc, contiguous
  at::Tensor column_nll;  // [N] acc, contiguous
  // Backward only, as grad_query and grad_key.
  at::Tensor row_weight;     // [M] acc, contiguous: dL/d of each nll
  at::Tensor column_weight;  // [N] acc
  // Whole batch only, or undefined: the gradient of query key^T by another loss, which is added for
  // the gradient of query, and for that of key if for_key is undefined.
  at::Tensor for_query, for_key;  // [N, N] acc, contiguous
  // Given with for_query, 0: receives factor dL/dS of this loss, for query, summed over the keys.
  at::Tensor row_sums;  // [N] float64
  int64_t part = 0;     // info_nce_products sums so many terms of a product at a time; 0: all
  // Any pairs only. The positives above are then references, and the nlls logs; both are undefined
  // for columns without losses.
  InfoNCESide rows, columns;
  bool exclude_self = false;
};

struct InfoNCEOptions {
  double scale;
  double label_smoothing;
  bool differentiate_keys;
  int64_t total;      // samples of the whole batch
  double factor;      // multiplies the gradients of query and key: scale, or 1 if the caller scales
  bool add_to_query;  // accumulate into grad_query, which holds the gradient of another loss
};

// All problems of a call have the same shape, dtype and set of defined tensors. If formed, their
// products are already computed.
void info_nce_statistics(const std::vector<InfoNCE>& problems, double scale, bool formed = false);
// Writes query key^T into the products of whole batches. Without `part`, with the bits of the
// statistics.
void info_nce_products(const std::vector<InfoNCE>& problems);
// Returns the gradient of scale, summed over the problems.
double info_nce_gradients(const std::vector<InfoNCE>& problems, const InfoNCEOptions& options);

// The same for any pairs, of rows and columns or of the rows only.
void info_nce_pairs_statistics(const std::vector<InfoNCE>& problems, double scale,
                               double label_smoothing);
double info_nce_pairs_gradients(const std::vector<InfoNCE>& problems, double scale,
                                double label_smoothing);

}  // namespace himo::cpu
