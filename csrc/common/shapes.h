// Leading dimensions: [*, ...] in the entry points, [B, ...] in the kernels.
#pragma once

#include <ATen/core/Tensor.h>

#include <initializer_list>
#include <vector>

namespace himo {

// Returns [*, tail...], with * the leading dimensions of x [*, N, D].
inline std::vector<int64_t> with_tail(const at::Tensor& x, std::initializer_list<int64_t> tail) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end() - 2);
  shape.insert(shape.end(), tail);
  return shape;
}

// Returns [losses, *, N, N], the shape of the cached logits of features [*, N, D].
inline std::vector<int64_t> products_shape(const at::Tensor& features, int64_t losses) {
  auto shape = with_tail(features, {features.size(-2), features.size(-2)});
  shape.insert(shape.begin(), losses);
  return shape;
}

// Returns the tensor with its leading dimensions flattened into one: [B, tail...].
inline at::Tensor flatten_lead(const at::Tensor& tensor, int64_t tail_dims) {
  const auto lead = tensor.sizes().slice(0, tensor.dim() - tail_dims);
  std::vector<int64_t> shape{c10::multiply_integers(lead)};
  shape.insert(shape.end(), tensor.sizes().end() - tail_dims, tensor.sizes().end());
  return tensor.reshape(shape);
}

}  // namespace himo
