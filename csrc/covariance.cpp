#include "covariance.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/GradMode.h>

#include "common/check.h"
#include "common/shapes.h"
#include "cpu/covariance_kernel.h"

namespace himo {
namespace {

void check_dtype(const char* op, at::ScalarType dtype) {
  HIMO_CHECK_DTYPE(is_computing_dtype(dtype), op, "dtype", "float32 or float64", dtype);
}

void check_bwd(const char* op, const at::Tensor& grad_mean, const char* grad_name,
               const at::Tensor& grad_moment, int64_t moment_dim, const at::Tensor& x,
               const at::Tensor& mean) {
  check_features(op, "x", x);
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

}  // namespace

std::tuple<at::Tensor, at::Tensor> covariance_fwd(const at::Tensor& x,  // [*, N, D]
                                                  at::ScalarType dtype) {
  const c10::NoGradGuard no_grad;
  check_features("covariance", "x", x);
  check_dtype("covariance", dtype);
  const auto options = x.options().dtype(dtype);
  const auto mean = at::empty(with_tail(x, {x.size(-1)}), options);
  const auto covariance = at::empty(with_tail(x, {x.size(-1), x.size(-1)}), options);
  // The kernels read memory, which ignores the lazy negation of a view.
  cpu::covariance_fwd(x.resolve_neg(), flatten_lead(mean, 1), flatten_lead(covariance, 2));
  return {mean, covariance};
}

std::tuple<at::Tensor, at::Tensor> gram_fwd(const at::Tensor& x,  // [*, N, D]
                                            at::ScalarType dtype) {
  const c10::NoGradGuard no_grad;
  check_features("gram", "x", x);
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
