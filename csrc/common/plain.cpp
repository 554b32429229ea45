#include "common/plain.h"

#include <ATen/Context.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/record_function.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include "common/check.h"

namespace himo {
namespace {

using Keys = c10::DispatchKeySet;

bool has_only(Keys keys, Keys allowed) { return (keys.raw_repr() & ~allowed.raw_repr()) == 0; }

}  // namespace

bool has_full_float32() {
  const auto allowed =
      at::globalContext().float32Precision(at::Float32Backend::MKLDNN, at::Float32Op::MATMUL);
  return allowed != at::Float32Precision::TF32 && allowed != at::Float32Precision::BF16;
}

bool is_plain_thread() {
  // Everything but callbacks and function modes changes the keys of the thread. So does inference
  // mode, which is plain.
  const auto keys = c10::impl::tls_local_dispatch_key_set();
  const auto changed =
      (keys.included_ ^ c10::default_included_set) | (keys.excluded_ ^ c10::default_excluded_set);
  const auto of_inference = c10::autograd_dispatch_keyset.add(c10::DispatchKey::ADInplaceOrView);
  return has_only(changed, of_inference) && at::impl::PythonTorchFunctionTLS::stack_len() == 0 &&
         !at::hasCallbacks();
}

bool is_plain(const at::Tensor& x) {
  constexpr Keys allowed({c10::DispatchKey::CPU, c10::DispatchKey::AutogradCPU,
                          c10::DispatchKey::ADInplaceOrView, c10::DispatchKey::AutocastCPU});
  return has_only(x.key_set(), allowed) && is_features_dtype(x.scalar_type());
}

}  // namespace himo
