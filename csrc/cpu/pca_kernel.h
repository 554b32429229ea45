// CPU kernels of pca, project_reconstruct and pca_reconstruct. x and incoming gradients may have
// any leading dimensions and strides; all other tensors are contiguous, with leading dimensions
// flattened to B. n = min(N, D). The columns of V are the eigenvectors of the small side: X^T X
// when D <= N, X X^T when N < D. Equation numbers refer to himo_kernels/pca/README.md.
#pragma once

#include <ATen/core/Tensor.h>

#include <utility>

namespace himo::cpu {

// Overwrites the moments of the small side with V and writes eigenvalues and rank; README (2). NaN
// or inf in a moment gives NaN eigenvalues, NaN V and rank n.
void decompose(const at::Tensor& moments,               // [B, n, n] float64, becomes V
               const at::Tensor& means,                 // [B, D] float64
               int64_t samples,                         // N
               double variance_threshold,               //
               const std::pair<double, double>& floor,  // himo::Floor
               const at::Tensor& eigenvalues,           // [B, n] float64, descending
               const at::Tensor& rank);                 // [B] int64

void components(const at::Tensor& x,             // [*, N, D]
                const at::Tensor& mean,          // [B, D] float64
                const at::Tensor& eigenvalues,   // [B, n] float64
                const at::Tensor& eigenvectors,  // [B, n, n] float64
                const at::Tensor& rank,          // [B] int64
                const at::Tensor& out);          // [B, n, D] float64

void pca_bwd(const at::Tensor& grad_mean,         // [B, D] float64
             const at::Tensor& grad_eigenvalues,  // [B, n] float64
             const at::Tensor& grad_components,   // [B, n, D] float64
             const at::Tensor& x,                 // [*, N, D]
             const at::Tensor& mean,              // [B, D] float64
             const at::Tensor& eigenvalues,       // [B, n] float64
             const at::Tensor& eigenvectors,      // [B, n, n] float64
             const at::Tensor& rank,              // [B] int64
             double gap_eps,                      //
             const at::Tensor& grad_x);           // [B, N, D]

void project_reconstruct_fwd(const at::Tensor& x,                // [*, N, D]
                             const at::Tensor& mean,             // [B, D] float32 or float64
                             const at::Tensor& components,       // [B, K, D], as mean
                             const at::Tensor& rank,             // [B] int64
                             const at::Tensor& reconstruction);  // [B, N, D], as x

void project_reconstruct_bwd(const at::Tensor& grad,              // [*, N, D]
                             const at::Tensor& x,                 // [*, N, D]
                             const at::Tensor& mean,              // [B, D] float32 or float64
                             const at::Tensor& components,        // [B, K, D], as mean
                             const at::Tensor& rank,              // [B] int64
                             const at::Tensor& grad_x,            // [B, N, D], as x
                             const at::Tensor& grad_mean,         // [B, D], as mean
                             const at::Tensor& grad_components);  // [B, K, D], as mean

void pca_reconstruct_fwd(const at::Tensor& x,                // [*, N, D]
                         const at::Tensor& mean,             // [B, D] float64
                         const at::Tensor& eigenvalues,      // [B, n] float64
                         const at::Tensor& eigenvectors,     // [B, n, n] float64
                         const at::Tensor& rank,             // [B] int64
                         const at::Tensor& reconstruction);  // [B, N, D], as x

void pca_reconstruct_bwd(const at::Tensor& grad,          // [*, N, D]
                         const at::Tensor& x,             // [*, N, D]
                         const at::Tensor& mean,          // [B, D] float64
                         const at::Tensor& eigenvalues,   // [B, n] float64
                         const at::Tensor& eigenvectors,  // [B, n, n] float64
                         const at::Tensor& rank,          // [B] int64
                         double gap_eps,                  //
                         bool differentiate_basis,        //
                         const at::Tensor& grad_x);       // [B, N, D], as x

// The same for M rows of a larger batch with D <= N, given the decomposition of the whole batch.
// B = 1 below. Products are float64.
void moment_reconstruct(const at::Tensor& x,                // [M, D]
                        const at::Tensor& mean,             // [D] float64
                        const at::Tensor& eigenvalues,      // [B, D] float64
                        const at::Tensor& eigenvectors,     // [B, D, D] float64
                        const at::Tensor& rank,             // [B] int64
                        const at::Tensor& reconstruction);  // [B, M, D], as x

// X^T G of these rows: README (4).
void moment_grad_projector(const at::Tensor& grad,  // [M, D]
                           const at::Tensor& x,     // [M, D]
                           const at::Tensor& mean,  // [D] float64
                           const at::Tensor& out);  // [D, D] float64

void moment_bwd(const at::Tensor& grad,            // [M, D]
                const at::Tensor& grad_mean,       // [D] float64, over the whole batch
                const at::Tensor& x,               // [M, D]
                const at::Tensor& mean,            // [D] float64
                const at::Tensor& grad_projector,  // [D, D] float64: B + B^T of the whole batch;
                                                   // undefined if the basis is constant
                const at::Tensor& eigenvalues,     // [B, D] float64
                const at::Tensor& eigenvectors,    // [B, D, D] float64
                const at::Tensor& rank,            // [B] int64
                double gap_eps,                    //
                const at::Tensor& grad_x);         // [B, M, D], as x

}  // namespace himo::cpu
