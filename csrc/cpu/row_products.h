// Products of the rows of a table with chosen rows of another, for inputs with any strides.
#pragma once

#include <ATen/core/Tensor.h>

namespace himo::cpu {

// products_i = x_i . y_k with k = places_i.
void row_products(const at::Tensor& x,          // [*, N, D]
                  const at::Tensor& y,          // [*, M, D], same dtype
                  const at::Tensor& places,     // [*, N] int64 in [0, M), contiguous
                  const at::Tensor& products);  // [*, N] acc, contiguous

}  // namespace himo::cpu
