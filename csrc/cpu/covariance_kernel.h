// CPU kernels of covariance and gram. x may have any leading dimensions and strides. All other
// tensors have their leading dimensions flattened to B; outputs are allocated by the caller. The
// dtype of the first [B, D] argument is the dtype of all sums.
#pragma once

#include <ATen/core/Tensor.h>

namespace himo::cpu {

void covariance_fwd(const at::Tensor& x,            // [*, N, D]
                    const at::Tensor& mean,         // [B, D], float32 or float64
                    const at::Tensor& covariance);  // [B, D, D], contiguous

void gram_fwd(const at::Tensor& x,      // [*, N, D]
              const at::Tensor& mean,   // [B, D], float32 or float64
              const at::Tensor& gram);  // [B, N, N], contiguous

void covariance_bwd(const at::Tensor& grad_mean,        // [B, D], float32 or float64
                    const at::Tensor& grad_covariance,  // [B, D, D], same dtype
                    const at::Tensor& x,                // [*, N, D]
                    const at::Tensor& grad_x);          // [B, N, D], contiguous

void gram_bwd(const at::Tensor& grad_mean,  // [B, D], float32 or float64
              const at::Tensor& grad_gram,  // [B, N, N], same dtype
              const at::Tensor& x,          // [*, N, D]
              const at::Tensor& mean,       // [B, D]
              const at::Tensor& grad_x);    // [B, N, D], contiguous

}  // namespace himo::cpu
