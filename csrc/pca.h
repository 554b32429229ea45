// Entry points of the cpu backend of pca, project_reconstruct and pca_reconstruct; shapes and
// dtypes are those of himo_kernels/pca/reference.py.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace himo {

// Returns mean [*, D], eigenvalues [*, n], components [*, n, D], rank [*] and V [*, n, n].
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> pca_fwd(
    const at::Tensor& x,  // [*, N, D]
    double variance_threshold);

at::Tensor pca_bwd(const at::Tensor& grad_mean,         // [*, D]
                   const at::Tensor& grad_eigenvalues,  // [*, n]
                   const at::Tensor& grad_components,   // [*, n, D]
                   const at::Tensor& x,                 // [*, N, D]
                   const at::Tensor& mean,              // [*, D]
                   const at::Tensor& eigenvalues,       // [*, n]
                   const at::Tensor& eigenvectors,      // [*, n, n]
                   const at::Tensor& rank,              // [*]
                   double gap_eps);

at::Tensor project_reconstruct_fwd(const at::Tensor& x,           // [*, N, D]
                                   const at::Tensor& mean,        // [*, D]
                                   const at::Tensor& components,  // [*, K, D]
                                   const at::Tensor& rank);       // [*]

// Returns the gradients of x, mean and components.
std::tuple<at::Tensor, at::Tensor, at::Tensor> project_reconstruct_bwd(
    const at::Tensor& grad,        // [*, N, D]
    const at::Tensor& x,           // [*, N, D]
    const at::Tensor& mean,        // [*, D]
    const at::Tensor& components,  // [*, K, D]
    const at::Tensor& rank);       // [*]

// Returns the reconstruction [*, N, D], rank [*], mean [*, D], eigenvalues [*, n] and V [*, n, n].
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> pca_reconstruct_fwd(
    const at::Tensor& x,  // [*, N, D]
    double variance_threshold);

at::Tensor pca_reconstruct_bwd(const at::Tensor& grad,          // [*, N, D]
                               const at::Tensor& x,             // [*, N, D]
                               const at::Tensor& mean,          // [*, D]
                               const at::Tensor& eigenvalues,   // [*, n]
                               const at::Tensor& eigenvectors,  // [*, n, n]
                               const at::Tensor& rank,          // [*]
                               double gap_eps, bool differentiate_basis);

}  // namespace himo
