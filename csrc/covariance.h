// Entry points of the cpu backend of covariance and gram, with X = x - mean(x):
//   covariance = X^T X   [*, D, D]
//   gram       = X X^T   [*, N, N]
// Both are unscaled, exactly symmetric and contiguous, in `dtype` (float32 or float64), whatever
// the floating dtype and the strides of x. NaN and inf in x flow into the result.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace himo {

std::tuple<at::Tensor, at::Tensor> covariance_fwd(const at::Tensor& x,  // [*, N, D]
                                                  at::ScalarType dtype);

std::tuple<at::Tensor, at::Tensor> gram_fwd(const at::Tensor& x,  // [*, N, D]
                                            at::ScalarType dtype);

// The dtype of `mean` is the one to compute in; the gradient is in the dtype of x.
at::Tensor covariance_bwd(const at::Tensor& grad_mean,        // [*, D]
                          const at::Tensor& grad_covariance,  // [*, D, D]
                          const at::Tensor& x,                // [*, N, D]
                          const at::Tensor& mean);            // [*, D]

at::Tensor gram_bwd(const at::Tensor& grad_mean,  // [*, D]
                    const at::Tensor& grad_gram,  // [*, N, N]
                    const at::Tensor& x,          // [*, N, D]
                    const at::Tensor& mean);      // [*, D]

}  // namespace himo
