#include "common/plain.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/record_function.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include "common/check.h"

namespace himo {
namespace {

using Keys = c10::DispatchKeySet;

bool has_only(Keys keys, Keys allowed) { return (keys.raw_repr() & ~allowed.raw_repr()) == 0; }

}  // namespace

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
  return has_only(x.key_set(), allowed) && is_features_dtype(x.scalar_type()) &&
         !(x.requires_grad() && c10::GradMode::is_enabled());
}

}  // namespace himo
