// normalize on the CPU, for inputs with any strides.
#pragma once

#include <ATen/core/Tensor.h>

namespace himo::cpu {

void normalize_fwd(const at::Tensor& x,            // [*, N, D]
                   const at::Tensor& normalized);  // [*, N, D], contiguous, same dtype

void normalize_bwd(const at::Tensor& grad,     // [*, N, D]
                   const at::Tensor& x,        // [*, N, D], same dtype
                   const at::Tensor& grad_x);  // [*, N, D], contiguous, same dtype

}  // namespace himo::cpu
