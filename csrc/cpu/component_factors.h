// Factors of the components of one problem, U' = C B, and what himo_loss computes from them.
// Equation numbers refer to himo_kernels/himo_loss/README.md.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "cpu/pca_problem.h"

namespace himo::cpu {

// The texts of one problem and their decomposition.
struct Texts {
  at::Tensor features;  // U [N, D]
  const double* mean;   // [D]
  Spectrum spectrum;
};

// All matrices have the dtype of the products: float, or double if float does not suffice.
struct Factors {
  at::Tensor centred;                             // X [N, D]
  at::Tensor coefficients;                        // C [N, R + 1], the last column 1
  at::Tensor basis;                               // B [R + 1, D], the last row the mean
  at::Tensor keys;                                // C / nu [N, R + 1], or C if not normalised
  std::vector<double> squares, overlaps, length;  // l [R], m [R] and nu [N] of (2)
};

// Query and keys of the logits of the component loss: [N, R + 1] if low_rank, else [N, D].
struct ComponentOperands {
  at::Tensor query, keys;
  bool low_rank = false, has_factors = false;  // no factors if U' = U or U is NaN
  Factors factors;
};

// `cache` [(2 N + D)(n + 1)], of the accumulation dtype, holds C, B and the query. It is read if
// `filled`, else written; an undefined cache is neither.
ComponentOperands component_operands(const at::Tensor& images,  // [N, D]
                                     const Texts& texts, bool normalize, const at::Tensor& cache,
                                     bool filled);

struct TextGradient {
  at::Tensor of_query, of_keys;  // of the operands, with of_query for the basis, (4)
  bool normalize, differentiate_basis;
  double gap_eps;
};

// grad_texts += (6) to (10), for operands with factors.
void add_text_gradient(const TextGradient& grad, const at::Tensor& images, const Texts& texts,
                       const ComponentOperands& operands,
                       const at::Tensor& grad_texts);  // [N, D] acc, contiguous

}  // namespace himo::cpu
