// Entry points of the cpu backend of himo_loss: HiDe and both losses in one call. Shapes and dtypes
// as in himo_kernels/himo_loss/cpu.py.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <variant>
#include <vector>

#include "pca.h"

namespace himo {

using HimoLossOutputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
                                   at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Returns loss [*], row and column nll [*, N] of both losses, then mean [*, D], eigenvalues [*, n],
// eigenvectors [*, n, n] and rank [*]. Writes the caches if given.
HimoLossOutputs himo_loss_fwd(const at::Tensor& images,       // [*, N, D]
                              const at::Tensor& texts,        // [*, N, D]
                              const at::Tensor& logit_scale,  // []
                              double variance_threshold, const Floor& floor,
                              bool normalize_components, double label_smoothing,
                              const std::optional<at::Tensor>& products,  // [2, *, N, N]
                              const std::optional<at::Tensor>& factors);  // [*, (2 N + D)(n + 1)]

// Returns [*, (2 N + D)(n + 1)], the shape of the cached factors of texts [*, N, D].
std::vector<int64_t> factors_shape(const at::Tensor& texts);

// What the forward saved.
struct HimoLossSaved {
  at::Tensor images, texts, logit_scale;
  at::Tensor row_nll, column_nll, component_row_nll, component_column_nll;
  at::Tensor mean, eigenvalues, eigenvectors, rank;
};

// Returns the gradients of images and texts [*, N, D], empty if not needed, and of logit_scale [],
// in the accumulation dtype.
std::tuple<at::Tensor, at::Tensor, at::Tensor> himo_loss_bwd(
    const at::Tensor& grad_contrastive_loss,  // [*]
    const at::Tensor& grad_component_loss,    // [*]
    const HimoLossSaved& saved, bool normalize_components, double label_smoothing,
    bool differentiate_keys, bool differentiate_basis, double gap_eps, bool needs_images,
    bool needs_texts, const std::optional<at::Tensor>& products,
    const std::optional<at::Tensor>& factors);

// The arguments of himo_kernels/himo_loss/api.py that are not tensors.
struct HimoLossSettings {
  double variance_threshold;
  std::optional<double> variance_floor;  // nothing is "relative"
  bool normalize_features;               // of the images and texts first, as HiMoLoss does
  bool normalize_components;
  double label_smoothing;
  bool differentiate_keys, differentiate_basis;
  double gap_eps;
};

// Returns both losses [*] and the rank [*]. Returns nothing if the call is not plain
// (common/plain.h) or an argument not valid: the caller then finds out why. Likewise if one of the
// two caches would take more than most_cached bytes.
std::optional<std::vector<at::Tensor>> himo_loss_plain(
    const std::vector<at::Tensor>& features,              // images and texts [*, N, D]
    const std::variant<at::Tensor, double>& logit_scale,  // of one element
    const HimoLossSettings& settings, int64_t most_cached);

}  // namespace himo
