// Plain calls of himo_loss and HiMoLoss: checks, normalisation, losses and autograd without Python.

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cmath>
#include <limits>

#include "common/check.h"
#include "common/plain.h"
#include "common/shapes.h"
#include "himo_loss.h"
#include "normalize.h"

namespace himo {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The normalised features, or these, as images and texts.
std::pair<at::Tensor, at::Tensor> compared(const at::Tensor& images, const at::Tensor& texts,
                                           const HimoLossSettings& settings) {
  if (!settings.normalize_features) return {images, texts};
  return {normalize_fwd(images), normalize_fwd(texts)};
}

// The same as floor_of in himo_kernels/pca/reference.py.
Floor floor_of(at::ScalarType dtype, const HimoLossSettings& settings) {
  if (settings.variance_floor) return {0.0, *settings.variance_floor};
  const int digits = dtype == at::kDouble  ? 52
                     : dtype == at::kFloat ? 23
                     : dtype == at::kHalf  ? 10
                                           : 7;
  return {std::ldexp(64.0, -2 * digits), 0.0};  // (8 eps)^2
}

HimoLossOutputs forward_of(const at::Tensor& images, const at::Tensor& texts,
                           const at::Tensor& logit_scale, const HimoLossSettings& settings,
                           const std::optional<at::Tensor>& products,
                           const std::optional<at::Tensor>& factors) {
  return himo_loss_fwd(images, texts, logit_scale, settings.variance_threshold,
                       floor_of(texts.scalar_type(), settings), settings.normalize_components,
                       settings.label_smoothing, products, factors);
}

bool are_valid(const HimoLossSettings& settings) {
  const auto is_positive = [](double value) {
    return value >= 0 && value <= std::numeric_limits<double>::max();
  };
  return settings.variance_threshold > 0 && settings.variance_threshold <= 1 &&
         settings.label_smoothing >= 0 && settings.label_smoothing <= 1 &&
         is_positive(settings.variance_floor.value_or(0)) && is_positive(settings.gap_eps);
}

}  // namespace

// The same as the autograd function of himo_kernels/himo_loss/op.py, after those of normalize if
// the features are normalised. Saves the tensors in the order of the backward's schema, then the
// features as given that need one. torch names the node after it, so it has no unnamed namespace.
struct HiMoLoss : torch::autograd::Function<HiMoLoss> {
  static constexpr size_t kSaved = 11;  // of the schema, without the caches

  static variable_list forward(AutogradContext* context, const at::Tensor& image_features,
                               const at::Tensor& text_features, const at::Tensor& logit_scale,
                               const HimoLossSettings& settings) {
    const at::AutoDispatchBelowADInplaceOrView no_autograd;
    const auto options = text_features.options().dtype(accumulation_dtype(text_features));
    const auto products = at::empty(products_shape(text_features, 2), options);
    const auto factors = at::empty(factors_shape(text_features), options);
    const auto [images, texts] = compared(image_features, text_features, settings);
    auto [loss, row_nll, column_nll, component_loss, component_row_nll, component_column_nll, mean,
          eigenvalues, eigenvectors, rank] =
        forward_of(images, texts, logit_scale, settings, products, factors);
    variable_list saved{images,
                        texts,
                        logit_scale,
                        row_nll,
                        column_nll,
                        component_row_nll,
                        component_column_nll,
                        mean,
                        eigenvalues,
                        eigenvectors,
                        rank,
                        products,
                        factors};
    if (settings.normalize_features) {
      // Those without a gradient may change before the backward, or be of inference mode.
      for (const auto& x : {image_features, text_features}) {
        saved.push_back(x.requires_grad() ? x : at::Tensor());
      }
    }
    context->save_for_backward(std::move(saved));
    context->mark_non_differentiable({rank});
    auto& data = context->saved_data;
    data["normalize_components"] = settings.normalize_components;
    data["label_smoothing"] = settings.label_smoothing;
    data["differentiate_keys"] = settings.differentiate_keys;
    data["differentiate_basis"] = settings.differentiate_basis;
    data["gap_eps"] = settings.gap_eps;
    return {loss, component_loss, rank};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grad_outputs) {
    refuse_double_backward("himo_loss");
    const variable_list grad_losses(grad_outputs.begin(), grad_outputs.begin() + 2);
    const auto saved = context->get_saved_variables();
    std::vector<bool> needs_grad;
    for (size_t i = 0; i < 3; ++i) needs_grad.push_back(context->needs_input_grad(i));
    // The forward's caller has checked the precision of matmuls; it may have changed since.
    const bool plain = is_plain_thread() && has_full_float32() && are_plain(grad_losses) &&
                       std::all_of(saved.begin(), saved.end(), is_dense);
    auto gradients = plain ? plain_backward(context, grad_losses, saved, needs_grad)
                           : observed_backward(context, grad_losses, saved, needs_grad);
    const size_t first = kSaved + 2;  // of the features as given
    for (size_t i = 0; i < 3; ++i) {
      if (!needs_grad[i]) {
        gradients[i] = at::Tensor();
      } else if (i < 2 && saved.size() > first) {
        gradients[i] =
            plain ? normalize_bwd(gradients[i], saved[first + i])
                  : call_operator("normalize_bwd", {gradients[i], saved[first + i], "cpu"})[0];
      }
    }
    gradients.resize(4);  // the settings have none
    return gradients;
  }

 private:
  static variable_list plain_backward(AutogradContext* context, const variable_list& grad_losses,
                                      const variable_list& saved,
                                      const std::vector<bool>& needs_grad) {
    const at::AutoDispatchBelowADInplaceOrView no_autograd;
    auto& data = context->saved_data;
    const HimoLossSaved of_forward{saved[0], saved[1], saved[2], saved[3], saved[4], saved[5],
                                   saved[6], saved[7], saved[8], saved[9], saved[10]};
    const auto [of_images, of_texts, of_scale] = himo_loss_bwd(
        grad_losses[0], grad_losses[1], of_forward, data["normalize_components"].toBool(),
        data["label_smoothing"].toDouble(), data["differentiate_keys"].toBool(),
        data["differentiate_basis"].toBool(), data["gap_eps"].toDouble(), needs_grad[0],
        needs_grad[1], saved[kSaved], saved[kSaved + 1]);
    return {of_images.to(saved[0].scalar_type()), of_texts.to(saved[1].scalar_type()),
            of_scale.to(saved[2].scalar_type())};
  }

  static variable_list observed_backward(AutogradContext* context, const variable_list& grad_losses,
                                         const variable_list& saved,
                                         const std::vector<bool>& needs_grad) {
    auto& data = context->saved_data;
    torch::jit::Stack arguments(grad_losses.begin(), grad_losses.end());
    arguments.insert(arguments.end(), saved.begin(), saved.begin() + kSaved);
    torch::jit::push(arguments, data["normalize_components"], data["label_smoothing"],
                     data["differentiate_keys"], data["differentiate_basis"], data["gap_eps"],
                     needs_grad, "cpu", saved[kSaved], saved[kSaved + 1]);
    return call_operator("himo_loss_bwd", std::move(arguments));
  }
};

std::optional<std::vector<at::Tensor>> himo_loss_plain(
    const std::vector<at::Tensor>& features, const std::variant<at::Tensor, double>& logit_scale,
    const HimoLossSettings& settings, int64_t most_cached) {
  if (!is_plain_thread() || features.size() != 2 || !are_plain_features(features)) return {};
  if (!are_valid(settings)) return {};
  const auto &images = features[0], &texts = features[1];
  const auto dtype = accumulation_dtype(texts);
  const auto scale = plain_scale(logit_scale, dtype);
  // A side of a small call is also one that every eigensolver takes.
  if (!scale.defined() || !is_small(products_shape(texts, 2), dtype, most_cached) ||
      !is_small(factors_shape(texts), dtype, most_cached)) {
    return {};
  }
  if (needs_gradient(features, scale)) return HiMoLoss::apply(images, texts, scale, settings);
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  const auto [own_images, own_texts] = compared(images, texts, settings);
  const auto outputs = forward_of(own_images, own_texts, scale, settings, {}, {});
  return std::vector<at::Tensor>{std::get<0>(outputs), std::get<3>(outputs), std::get<9>(outputs)};
}

}  // namespace himo
