// Entry points of the cpu backend of pca, project_reconstruct and pca_reconstruct. Shapes and
// dtypes as in himo_kernels/pca/reference.py.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

namespace himo {

// f and g: a batch has no variance if trace <= f sum(x^2) + g; README (2').
using Floor = std::pair<double, double>;

struct Decomposition {
  at::Tensor mean, eigenvalues, eigenvectors, rank;  // [*, D], [*, n], [*, n, n], [*]
};

// Checks what a caller passes as the decomposition of x [*, N, D]. Returns it contiguous, with the
// leading dimensions flattened into one.
Decomposition flat_decomposition(const char* op, const at::Tensor& x, const at::Tensor& mean,
                                 const at::Tensor& eigenvalues, const at::Tensor& eigenvectors,
                                 const at::Tensor& rank);

// Returns the eigensolver chosen for n x n matrices on this processor: "himo" or "lapack".
std::string eigensolver(int64_t n);

// Returns eigenvalues [B, n], descending, and eigenvectors [B, n, n] as columns, by the solver
// named.
std::tuple<at::Tensor, at::Tensor> solve_symmetric(const at::Tensor& matrix,  // [B, n, n] float64
                                                   const std::string& solver);

// Returns mean [*, D], eigenvalues [*, n], V [*, n, n] and rank [*].
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> pca_decompose(
    const at::Tensor& x,  // [*, N, D]
    double variance_threshold, const Floor& floor);

// Returns mean [*, D], eigenvalues [*, n], components [*, n, D], rank [*] and V [*, n, n].
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> pca_fwd(
    const at::Tensor& x,  // [*, N, D]
    double variance_threshold, const Floor& floor);

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
    double variance_threshold, const Floor& floor);

at::Tensor pca_reconstruct_bwd(const at::Tensor& grad,          // [*, N, D]
                               const at::Tensor& x,             // [*, N, D]
                               const at::Tensor& mean,          // [*, D]
                               const at::Tensor& eigenvalues,   // [*, n]
                               const at::Tensor& eigenvectors,  // [*, n, n]
                               const at::Tensor& rank,          // [*]
                               double gap_eps, bool differentiate_basis);

// The steps of pca_reconstruct for the rows that one process holds of a larger batch, see
// himo_kernels/pca/moment.py. X^T X of the whole batch is decomposed.

// Returns eigenvalues [D], eigenvectors [D, D] and rank [].
std::tuple<at::Tensor, at::Tensor, at::Tensor> pca_moment_decompose(
    const at::Tensor& moment,  // [D, D] float64
    const at::Tensor& mean,    // [D]
    int64_t samples, double variance_threshold, const Floor& floor);

at::Tensor pca_moment_reconstruct(const at::Tensor& x,             // [M, D]
                                  const at::Tensor& mean,          // [D]
                                  const at::Tensor& eigenvalues,   // [D]
                                  const at::Tensor& eigenvectors,  // [D, D]
                                  const at::Tensor& rank);         // []

// Returns X^T G [D, D] float64 of these rows.
at::Tensor pca_moment_grad_projector(const at::Tensor& grad,   // [M, D]
                                     const at::Tensor& x,      // [M, D]
                                     const at::Tensor& mean);  // [D]

at::Tensor pca_moment_bwd(const at::Tensor& grad,                           // [M, D]
                          const at::Tensor& grad_mean,                      // [D]
                          const at::Tensor& x,                              // [M, D]
                          const at::Tensor& mean,                           // [D]
                          const std::optional<at::Tensor>& grad_projector,  // [D, D]
                          const at::Tensor& eigenvalues,                    // [D]
                          const at::Tensor& eigenvectors,                   // [D, D]
                          const at::Tensor& rank,                           // []
                          double gap_eps);

}  // namespace himo
