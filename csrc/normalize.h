// Entry points of the cpu backend of normalize: rows divided by their L2 norm. Results are
// contiguous and have the dtype of x; sums are float32, or float64 for float64.
#pragma once

#include <ATen/core/Tensor.h>

namespace himo {

at::Tensor normalize_fwd(const at::Tensor& x);  // [*, N, D]

at::Tensor normalize_bwd(const at::Tensor& grad,  // [*, N, D]
                         const at::Tensor& x);    // [*, N, D]

}  // namespace himo
