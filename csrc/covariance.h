// Entry points of the cpu backend of covariance and gram, with X = x - mean(x):
//   covariance = X^T X   [*, D, D]
//   gram       = X X^T   [*, N, N]
// Both are unscaled, exactly symmetric and contiguous, in `dtype` (float32 or float64). x may have
// any floating dtype and strides. NaN and inf in x propagate to the result.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace himo {

std::tuple<at::Tensor, at::Tensor> covariance_fwd(const at::Tensor& x,  // [*, N, D]
                                                  at::ScalarType dtype);

std::tuple<at::Tensor, at::Tensor> gram_fwd(const at::Tensor& x,  // [*, N, D]
                                            at::ScalarType dtype);

// Computes in the dtype of `mean`; the gradient has the dtype of x.
at::Tensor covariance_bwd(const at::Tensor& grad_mean,        // [*, D]
                          const at::Tensor& grad_covariance,  // [*, D, D]
                          const at::Tensor& x,                // [*, N, D]
                          const at::Tensor& mean);            // [*, D]

at::Tensor gram_bwd(const at::Tensor& grad_mean,  // [*, D]
                    const at::Tensor& grad_gram,  // [*, N, N]
                    const at::Tensor& x,          // [*, N, D]
                    const at::Tensor& mean);      // [*, D]

}  // namespace himo
