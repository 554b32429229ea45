#include "normalize.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/GradMode.h>

#include "common/check.h"
#include "cpu/normalize_kernel.h"

namespace himo {

at::Tensor normalize_fwd(const at::Tensor& x) {  // [*, N, D]
  const c10::NoGradGuard no_grad;
  check_features("normalize", "features", x);
  const auto normalized = at::empty(x.sizes(), x.options());
  // The kernels read raw memory, which does not include the lazy minus sign of a negated view.
  cpu::normalize_fwd(x.resolve_neg(), normalized);
  return normalized;
}

at::Tensor normalize_bwd(const at::Tensor& grad,  // [*, N, D]
                         const at::Tensor& x) {   // [*, N, D]
  const c10::NoGradGuard no_grad;
  check_features("normalize", "features", x);
  check_features("normalize", "grad", grad);
  HIMO_CHECK_SHAPE(grad.sizes().equals(x.sizes()), "normalize", "grad", grad, x.sizes());
  HIMO_CHECK_DTYPE(grad.scalar_type() == x.scalar_type(), "normalize", "grad", x.scalar_type(),
                   grad.scalar_type());
  const auto grad_x = at::empty(x.sizes(), x.options());
  cpu::normalize_bwd(grad.resolve_neg(), x.resolve_neg(), grad_x);
  return grad_x;
}

}  // namespace himo
