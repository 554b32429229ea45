#include "common/plain.h"

#include <ATen/Context.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/record_function.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

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

bool is_dense(const at::Tensor& x) {
  constexpr Keys allowed({c10::DispatchKey::CPU, c10::DispatchKey::AutogradCPU,
                          c10::DispatchKey::ADInplaceOrView, c10::DispatchKey::AutocastCPU});
  return has_only(x.key_set(), allowed);
}

bool is_plain(const at::Tensor& x) { return is_dense(x) && is_features_dtype(x.scalar_type()); }

bool are_plain(const std::vector<at::Tensor>& tensors) {
  return std::all_of(tensors.begin(), tensors.end(), is_plain);
}

bool are_plain_features(const std::vector<at::Tensor>& features) {
  if (features.empty() || !are_plain(features)) return false;
  const auto& first = features[0];
  for (const auto& x : features) {
    if (x.scalar_type() != first.scalar_type() || !x.sizes().equals(first.sizes())) return false;
  }
  return first.dim() >= 2 && first.size(-2) > 0 && first.size(-1) > 0;
}

at::Tensor plain_scale(const std::variant<at::Tensor, double>& logit_scale, at::ScalarType dtype) {
  if (const auto* number = std::get_if<double>(&logit_scale)) {
    if (!(std::abs(*number) <= std::numeric_limits<float>::max())) return {};
    return at::scalar_tensor(*number, at::TensorOptions(dtype));
  }
  const auto& given = std::get<at::Tensor>(logit_scale);
  if (!given.defined() || !is_plain(given) || given.numel() != 1) return {};
  return given.dim() == 0 ? given : given.reshape({});
}

bool needs_gradient(const std::vector<at::Tensor>& features, const at::Tensor& logit_scale) {
  const auto requires_grad = [](const at::Tensor& x) { return x.requires_grad(); };
  return c10::GradMode::is_enabled() &&
         (logit_scale.requires_grad() ||
          std::any_of(features.begin(), features.end(), requires_grad));
}

bool is_small(at::IntArrayRef shape, at::ScalarType dtype, int64_t most_bytes) {
  auto bytes = static_cast<double>(c10::elementSize(dtype));  // int64_t may overflow
  for (const int64_t size : shape) bytes *= static_cast<double>(size);
  return bytes <= static_cast<double>(most_bytes);
}

void refuse_double_backward(const char* op) {
  TORCH_CHECK(!c10::GradMode::is_enabled(), op,
              ": expected a first-order gradient, got create_graph=True (double backward is not "
              "supported)");
}

std::vector<at::Tensor> call_operator(const char* name, torch::jit::Stack arguments) {
  const auto full_name = std::string("himo_kernels::") + name;
  c10::Dispatcher::singleton().findSchemaOrThrow(full_name.c_str(), "").callBoxed(arguments);
  std::vector<at::Tensor> results;
  for (const auto& value : arguments) results.push_back(value.toTensor());
  return results;
}

}  // namespace himo
