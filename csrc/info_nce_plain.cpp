// Plain calls of info_nce and dual_info_nce, with or without gradients: checks, losses and autograd
// without Python, which takes long beside a small loss.

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>

#include "common/check.h"
#include "common/plain.h"
#include "common/shapes.h"
#include "info_nce.h"

namespace himo {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

const char* operator_name(size_t losses) { return losses == 1 ? "info_nce" : "dual_info_nce"; }
const char* backward_name(size_t losses) {
  return losses == 1 ? "info_nce_bwd" : "dual_info_nce_bwd";
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
    const int64_t count = static_cast<int64_t>(features.size()) - 1;
    const auto products =
        at::empty(products_shape(query, count), query.options().dtype(accumulation_dtype(query)));
    variable_list losses, saved = features.vec();
    saved.push_back(logit_scale);
    for (int64_t i = 0; i < count; ++i) {
      auto [loss, row_nll, column_nll] =
          info_nce_fwd(query, features[i + 1], logit_scale, label_smoothing, products.select(0, i));
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
    refuse_double_backward(operator_name(count));
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
      torch::jit::Stack arguments(grad_losses.begin(), grad_losses.end());
      arguments.insert(arguments.end(), saved.begin(), saved.end());
      torch::jit::push(arguments, label_smoothing, differentiate_keys, needs_grad, "cpu", products);
      gradients = call_operator(backward_name(count), std::move(arguments));
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

std::optional<std::vector<at::Tensor>> info_nce_plain(
    const std::vector<at::Tensor>& features, const std::variant<at::Tensor, double>& logit_scale,
    double label_smoothing, bool differentiate_keys, int64_t most_cached) {
  if (!is_plain_thread() || !are_plain_features(features)) return {};
  if (!(label_smoothing >= 0 && label_smoothing <= 1)) return {};
  const auto& query = features[0];
  const auto dtype = accumulation_dtype(query);
  const auto scale = plain_scale(logit_scale, dtype);
  if (!scale.defined()) return {};

  const size_t count = features.size() - 1;
  if (needs_gradient(features, scale)) {
    if (!is_small(products_shape(query, static_cast<int64_t>(count)), dtype, most_cached))
      return {};
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
