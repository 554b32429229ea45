// Argument checks of the entry points. The Python API has already checked its arguments; these
// protect direct calls of himo_kernels._C from reading out of bounds.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>

// ValueError: `covariance: expected x of shape [*, N, D], got [3]`.
#define HIMO_CHECK_SHAPE(condition, op, name, tensor, expected)                           \
  TORCH_CHECK_VALUE(condition, op, ": expected ", name, " of shape ", expected, ", got ", \
                    (tensor).sizes())

// TypeError: `covariance: expected dtype to be float32 or float64, got Half`.
#define HIMO_CHECK_DTYPE(condition, op, name, expected, dtype) \
  TORCH_CHECK_TYPE(condition, op, ": expected ", name, " to be ", expected, ", got ", dtype)

// ValueError: `covariance: expected x to be a strided CPU tensor, got layout Strided on cuda:0`.
#define HIMO_CHECK_CPU(op, name, tensor)                                                 \
  TORCH_CHECK_VALUE((tensor).device().is_cpu() && (tensor).layout() == at::kStrided, op, \
                    ": expected ", name, " to be a strided CPU tensor, got layout ",     \
                    (tensor).layout(), " on ", (tensor).device())

namespace himo {

inline bool is_computing_dtype(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kDouble;
}

inline bool is_features_dtype(at::ScalarType dtype) {
  return is_computing_dtype(dtype) || dtype == at::kHalf || dtype == at::kBFloat16;
}

// The dtype of sums and logits.
inline at::ScalarType accumulation_dtype(const at::Tensor& features) {
  return features.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// Of gradients that the kernels of the losses write: they sum in the accumulation dtype, and round
// the sums to bfloat16.
inline at::ScalarType gradient_dtype(const at::Tensor& features) {
  return features.scalar_type() == at::kBFloat16 ? at::kBFloat16 : accumulation_dtype(features);
}

inline void check_features(const char* op, const char* name, const at::Tensor& x) {
  HIMO_CHECK_CPU(op, name, x);
  HIMO_CHECK_SHAPE(x.dim() >= 2, op, name, x, "[*, N, D]");
  const auto dtype = x.scalar_type();
  HIMO_CHECK_DTYPE(is_features_dtype(dtype), op, name, "float16, bfloat16, float32 or float64",
                   dtype);
}

// Checks query key^T [*, N, M], the cache of logits before scaling, if there is one.
inline void check_products(const char* op, const std::optional<at::Tensor>& products,
                           const at::Tensor& query,  // [*, N, K]
                           const at::Tensor& key) {  // [*, M, K]
  if (!products) return;
  auto shape = query.sizes().vec();
  shape.back() = key.size(-2);
  HIMO_CHECK_CPU(op, "products", *products);
  HIMO_CHECK_SHAPE(
      products->sizes().equals(shape) && products->is_contiguous() && !products->is_neg(), op,
      "products", *products, at::IntArrayRef(shape));
  const auto dtype = accumulation_dtype(query);
  HIMO_CHECK_DTYPE(products->scalar_type() == dtype, op, "products", dtype,
                   products->scalar_type());
}

}  // namespace himo
