// Plain calls of info_nce and dual_info_nce, with or without gradients: checks, losses and autograd
// without Python, which takes long beside a small loss.

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "common/check.h"
#include "common/plain.h"
#include "common/shapes.h"
#include "info_nce.h"

namespace himo {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

const char* operator_name(size_t losses) { return losses == 1 ? "info_nce" : "dual_info_nce"; }

// [losses, *, N, N]
std::vector<int64_t> products_shape(const at::Tensor& query, size_t losses) {
  auto shape = with_tail(query, {query.size(-2), query.size(-2)});
  shape.insert(shape.begin(), static_cast<int64_t>(losses));
  return shape;
}

bool are_plain(const std::vector<at::Tensor>& tensors) {
  return std::all_of(tensors.begin(), tensors.end(), is_plain);
}

// The operator's backward, as Python calls it: for gradients that something observes or transforms.
variable_list dispatched_backward(size_t losses, const variable_list& arguments,
                                  const at::Tensor& products, double label_smoothing,
                                  bool differentiate_keys, const std::vector<bool>& needs_grad) {
  const auto name = std::string("himo_kernels::") + operator_name(losses) + "_bwd";
  const auto kernel = c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), "");
  torch::jit::Stack stack(arguments.begin(), arguments.end());
  torch::jit::push(stack, label_smoothing, differentiate_keys, needs_grad, "cpu", products);
  kernel.callBoxed(stack);
  variable_list gradients;
  for (const auto& value : stack) gradients.push_back(value.toTensor());
  return gradients;
}

}  // namespace

// The same as the autograd function of himo_kernels/info_nce/op.py. Saves the tensors in the order
// of the backward's schema. torch names the node after it, so it has no unnamed namespace.
struct ContrastiveLoss : torch::autograd::Function<ContrastiveLoss> {
  static variable_list forward(AutogradContext* context, at::TensorList features,
                               const at::Tensor& logit_scale, double label_smoothing,
                               bool differentiate_keys) {
    const at::AutoDispatchBelowADInplaceOrView no_autograd;
    const auto& query = features[0];
    const size_t count = features.size() - 1;
    const auto products =
        at::empty(products_shape(query, count), query.options().dtype(accumulation_dtype(query)));
    variable_list losses, saved = features.vec();
    saved.push_back(logit_scale);
    for (size_t i = 0; i < count; ++i) {
      auto [loss, row_nll, column_nll] =
          info_nce_fwd(query, features[i + 1], logit_scale, label_smoothing,
                       products.select(0, static_cast<int64_t>(i)));
      losses.push_back(std::move(loss));
      saved.push_back(std::move(row_nll));
      saved.push_back(std::move(column_nll));
    }
    saved.push_back(products);
    context->save_for_backward(std::move(saved));
    context->saved_data["label_smoothing"] = label_smoothing;
    context->saved_data["differentiate_keys"] = differentiate_keys;
    return losses;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grad_losses) {
    const size_t count = grad_losses.size(), inputs = count + 2;
    TORCH_CHECK(!c10::GradMode::is_enabled(), operator_name(count),
                ": expected a first-order gradient, got create_graph=True (double backward is not "
                "supported)");
    const double label_smoothing = context->saved_data["label_smoothing"].toDouble();
    const bool differentiate_keys = context->saved_data["differentiate_keys"].toBool();
    auto saved = context->get_saved_variables();
    const auto products = saved.back();
    saved.pop_back();
    std::vector<bool> needs_grad;
    for (size_t i = 0; i < inputs; ++i) needs_grad.push_back(context->needs_input_grad(i));

    variable_list gradients;
    // The forward's caller has checked the precision of matmuls; it may have changed since.
    if (is_plain_thread() && has_full_float32() && are_plain(grad_losses) && are_plain(saved) &&
        is_plain(products)) {
      gradients = plain_backward(grad_losses, saved, products, label_smoothing, differentiate_keys,
                                 needs_grad);
    } else {
      auto arguments = grad_losses;
      arguments.insert(arguments.end(), saved.begin(), saved.end());
      gradients = dispatched_backward(count, arguments, products, label_smoothing,
                                      differentiate_keys, needs_grad);
    }
    for (size_t i = 0; i < inputs; ++i) {
      if (!needs_grad[i]) gradients[i] = at::Tensor();
    }
    gradients.resize(inputs + 2);  // the settings have none
    return gradients;
  }

 private:
  static variable_list plain_backward(const variable_list& grad_losses, const variable_list& saved,
                                      const at::Tensor& products, double label_smoothing,
                                      bool differentiate_keys,
                                      const std::vector<bool>& needs_grad) {
    const size_t count = grad_losses.size();
    const auto &query = saved[0], &logit_scale = saved[count + 1];
    variable_list gradients(count + 2);
    std::optional<at::Tensor> query_sum;
    at::Tensor scale_sum;
    for (size_t i = 0; i < count; ++i) {
      const auto &row_nll = saved[count + 2 + 2 * i], &column_nll = saved[count + 3 + 2 * i];
      const auto [of_query, of_key, of_scale] =
          info_nce_bwd(grad_losses[i], query, saved[i + 1], logit_scale, row_nll, column_nll,
                       label_smoothing, differentiate_keys, needs_grad[0], needs_grad[i + 1],
                       products.select(0, static_cast<int64_t>(i)), query_sum);
      if (needs_grad[0]) query_sum = of_query;
      gradients[i + 1] = of_key.to(query.scalar_type());
      scale_sum = scale_sum.defined() ? scale_sum.add(of_scale) : of_scale;
    }
    if (query_sum) gradients[0] = query_sum->to(query.scalar_type());
    gradients[count + 1] = scale_sum.to(logit_scale.scalar_type());
    return gradients;
  }
};

namespace {

// A number as the tensor [] that the kernels read; undefined if it is not valid.
at::Tensor scale_of(double number, at::ScalarType dtype) {
  if (!(std::abs(number) <= std::numeric_limits<float>::max())) return {};
  return at::scalar_tensor(number, at::TensorOptions(dtype));
}

}  // namespace

std::optional<std::vector<at::Tensor>> info_nce_plain(
    const std::vector<at::Tensor>& features, const std::variant<at::Tensor, double>& logit_scale,
    double label_smoothing, bool differentiate_keys, int64_t most_cached) {
  if (!is_plain_thread() || features.empty() || !are_plain(features)) return {};
  const auto& query = features[0];
  for (const auto& x : features) {
    if (x.scalar_type() != query.scalar_type() || !x.sizes().equals(query.sizes())) return {};
  }
  if (query.dim() < 2 || query.size(-2) == 0 || query.size(-1) == 0) return {};
  if (!(label_smoothing >= 0 && label_smoothing <= 1)) return {};
  const auto dtype = accumulation_dtype(query);
  const auto* tensor = std::get_if<at::Tensor>(&logit_scale);
  const auto given = tensor ? *tensor : scale_of(std::get<double>(logit_scale), dtype);
  if (!given.defined() || !is_plain(given) || given.numel() != 1) return {};
  const auto scale = given.dim() == 0 ? given : given.reshape({});

  const size_t count = features.size() - 1;
  const auto requires_grad = [](const at::Tensor& x) { return x.requires_grad(); };
  if (c10::GradMode::is_enabled() &&
      (scale.requires_grad() || std::any_of(features.begin(), features.end(), requires_grad))) {
    const int64_t size = c10::multiply_integers(products_shape(query, count));
    if (size * static_cast<int64_t>(c10::elementSize(dtype)) > most_cached) return {};
    return ContrastiveLoss::apply(at::TensorList(features), scale, label_smoothing,
                                  differentiate_keys);
  }
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  std::vector<at::Tensor> losses;
  for (size_t i = 1; i <= count; ++i) {
    losses.push_back(
        std::get<0>(info_nce_fwd(query, features[i], scale, label_smoothing, /*products=*/{})));
  }
  return losses;
}

}  // namespace himo
