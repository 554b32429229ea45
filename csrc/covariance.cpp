#include "covariance.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <vector>

#include "common/check.h"
#include "cpu/covariance_kernel.h"

namespace himo {
namespace {

bool is_computing_dtype(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kDouble;
}

void check_x(const char* op, const at::Tensor& x) {
  HIMO_CHECK_CPU(op, "x", x);
  HIMO_CHECK_SHAPE(x.dim() >= 2, op, "x", x, "[*, N, D]");
  const auto dtype = x.scalar_type();
  HIMO_CHECK_DTYPE(is_computing_dtype(dtype) || dtype == at::kHalf || dtype == at::kBFloat16, op,
                   "x", "float16, bfloat16, float32 or float64", dtype);
}

void check_dtype(const char* op, at::ScalarType dtype) {
  HIMO_CHECK_DTYPE(is_computing_dtype(dtype), op, "dtype", "float32 or float64", dtype);
}

// Returns [*, tail...], with * the leading dimensions of x.
std::vector<int64_t> with_tail(const at::Tensor& x, std::initializer_list<int64_t> tail) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end() - 2);
  shape.insert(shape.end(), tail);
  return shape;
}

void check_bwd(const char* op, const at::Tensor& grad_mean, const char* grad_name,
               const at::Tensor& grad_moment, int64_t moment_dim, const at::Tensor& x,
               const at::Tensor& mean) {
  check_x(op, x);
  HIMO_CHECK_CPU(op, "mean", mean);
  HIMO_CHECK_CPU(op, "grad_mean", grad_mean);
  HIMO_CHECK_CPU(op, grad_name, grad_moment);
  check_dtype(op, mean.scalar_type());
  const int64_t side = x.size(moment_dim);
  const auto row = with_tail(x, {x.size(-1)});
  const auto square = with_tail(x, {side, side});
  HIMO_CHECK_SHAPE(mean.sizes().equals(row), op, "mean", mean, at::IntArrayRef(row));
  HIMO_CHECK_SHAPE(grad_mean.sizes().equals(row), op, "grad_mean", grad_mean, at::IntArrayRef(row));
  HIMO_CHECK_SHAPE(grad_moment.sizes().equals(square), op, grad_name, grad_moment,
                   at::IntArrayRef(square));
}

// Returns the tensor with its leading dimensions as one, [B, tail...].
at::Tensor flatten_lead(const at::Tensor& tensor, int64_t tail_dims) {
  const auto lead = tensor.sizes().slice(0, tensor.dim() - tail_dims);
  std::vector<int64_t> shape{c10::multiply_integers(lead)};
  shape.insert(shape.end(), tensor.sizes().end() - tail_dims, tensor.sizes().end());
  return tensor.reshape(shape);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> covariance_fwd(const at::Tensor& x,  // [*, N, D]
                                                  at::ScalarType dtype) {
  const c10::NoGradGuard no_grad;
  check_x("covariance", x);
  check_dtype("covariance", dtype);
  const auto options = x.options().dtype(dtype);
  const auto mean = at::empty(with_tail(x, {x.size(-1)}), options);
  const auto covariance = at::empty(with_tail(x, {x.size(-1), x.size(-1)}), options);
  // The kernels read memory, where the lazy minus sign of a negated view is not.
  cpu::covariance_fwd(x.resolve_neg(), flatten_lead(mean, 1), flatten_lead(covariance, 2));
  return {mean, covariance};
}

std::tuple<at::Tensor, at::Tensor> gram_fwd(const at::Tensor& x,  // [*, N, D]
                                            at::ScalarType dtype) {
  const c10::NoGradGuard no_grad;
  check_x("gram", x);
  check_dtype("gram", dtype);
  const auto options = x.options().dtype(dtype);
  const auto mean = at::empty(with_tail(x, {x.size(-1)}), options);
  const auto gram = at::empty(with_tail(x, {x.size(-2), x.size(-2)}), options);
  cpu::gram_fwd(x.resolve_neg(), flatten_lead(mean, 1), flatten_lead(gram, 2));
  return {mean, gram};
}

at::Tensor covariance_bwd(const at::Tensor& grad_mean,        // [*, D]
                          const at::Tensor& grad_covariance,  // [*, D, D]
                          const at::Tensor& x,                // [*, N, D]
                          const at::Tensor& mean) {           // [*, D]
  const c10::NoGradGuard no_grad;
  check_bwd("covariance", grad_mean, "grad_covariance", grad_covariance, -1, x, mean);
  const auto grad_x = at::empty(x.sizes(), x.options());
  cpu::covariance_bwd(flatten_lead(grad_mean.to(mean.scalar_type()), 1),
                      flatten_lead(grad_covariance.to(mean.scalar_type()), 2), x.resolve_neg(),
                      flatten_lead(grad_x, 2));
  return grad_x;
}

at::Tensor gram_bwd(const at::Tensor& grad_mean,  // [*, D]
                    const at::Tensor& grad_gram,  // [*, N, N]
                    const at::Tensor& x,          // [*, N, D]
                    const at::Tensor& mean) {     // [*, D]
  const c10::NoGradGuard no_grad;
  check_bwd("gram", grad_mean, "grad_gram", grad_gram, -2, x, mean);
  const auto grad_x = at::empty(x.sizes(), x.options());
  cpu::gram_bwd(flatten_lead(grad_mean.to(mean.scalar_type()), 1),
                flatten_lead(grad_gram.to(mean.scalar_type()), 2), x.resolve_neg(),
                flatten_lead(mean, 1), flatten_lead(grad_x, 2));
  return grad_x;
}

}  // namespace himo
