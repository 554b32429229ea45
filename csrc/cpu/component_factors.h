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
  std::vector<double> along_mean;                 // X mu [N], with shared products
};

// Query and keys of the logits of the component loss: [N, R + 1] if low_rank, else [N, D].
struct ComponentOperands {
  at::Tensor query, keys;
  bool low_rank = false, has_factors = false;  // no factors if U' = U or U is NaN
  Factors factors;                             // without B with shared products
};

// `cache` [(2 N + D)(n + 1)], of the accumulation dtype, holds C, B and the query. It is read if
// `filled`, else written; an undefined cache is neither.
ComponentOperands component_operands(const at::Tensor& images,  // [N, D]
                                     const Texts& texts, bool normalize, const at::Tensor& cache,
                                     bool filled);

// Whether both losses of these texts share the products V X^T; README "Shared products".
bool shares_products(const Texts& texts);

// What the two losses of one problem share.
struct SharedProducts {
  at::Tensor centred;              // X [N, D]
  at::Tensor products;             // V X^T [N, N]
  std::vector<double> along_mean;  // V mu [N]
};

// Returns X [N, D], of texts that share products.
at::Tensor centred_texts(const Texts& texts);

// Returns x mu [N], summed in float64.
std::vector<double> products_with_mean(const at::Tensor& x, const Texts& texts);  // [N, D]

// Writes V U^T = V X^T + V mu 1^T; (11). Without V mu, only V X^T.
void write_logits(const SharedProducts& shared, const at::Tensor& out);  // [N, N] contiguous

// out += factors mu^T
void add_along_mean(const at::Tensor& factors,                   // [N] float64, contiguous
                    const Texts& texts, const at::Tensor& out);  // [N, D] acc, contiguous

// The operands with A of (12).
ComponentOperands operands_from_products(const SharedProducts& shared, const Texts& texts,
                                         bool normalize);

// Writes what the query of these operands adds to the gradient of V X^T [N, N]; (13). Without the
// part that goes through the basis, only the mean of dU' is left.
void write_gradient_of_products(const at::Tensor& of_query, const ComponentOperands& operands,
                                bool through_basis, const at::Tensor& out);

struct TextGradient {
  at::Tensor of_query, of_keys;  // of the operands, with of_query for the basis, (4)
  bool normalize, differentiate_basis;
  double gap_eps;
};

// grad_texts += (6) to (10), for operands with factors.
void add_text_gradient(const TextGradient& grad, const at::Tensor& images, const Texts& texts,
                       const ComponentOperands& operands,
                       const at::Tensor& grad_texts);  // [N, D] acc, contiguous

// grad_texts += (15), (9) and (16): what does not go through V X^T.
void add_text_gradient_from_products(const TextGradient& grad, const at::Tensor& images,
                                     const at::Tensor& products,  // V X^T [N, N]
                                     const Texts& texts, const ComponentOperands& operands,
                                     const at::Tensor& grad_texts);  // [N, D] acc, contiguous

}  // namespace himo::cpu
