#include "himo_loss.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <cmath>
#include <utility>

#include "common/check.h"
#include "common/shapes.h"
#include "cpu/component_factors.h"
#include "cpu/tensor_matrix.h"
#include "info_nce.h"
#include "normalize.h"

namespace himo {
namespace {

constexpr const char* kOp = "himo_loss";

using Optional = std::optional<at::Tensor>;

void check(const at::Tensor& images, const at::Tensor& texts, const Optional& factors) {
  check_features(kOp, "image_features", images);
  check_features(kOp, "text_features", texts);
  HIMO_CHECK_SHAPE(texts.sizes().equals(images.sizes()), kOp, "text_features", texts,
                   images.sizes());
  HIMO_CHECK_SHAPE(texts.size(-1) > 0 && texts.size(-2) > 0, kOp, "text_features", texts,
                   "[*, N, D] with at least one row and one column");
  HIMO_CHECK_DTYPE(texts.scalar_type() == images.scalar_type(), kOp, "text_features",
                   images.scalar_type(), texts.scalar_type());
  if (!factors) return;
  const auto shape = factors_shape(texts);
  HIMO_CHECK_CPU(kOp, "factors", *factors);
  HIMO_CHECK_SHAPE(factors->sizes().equals(shape) && factors->is_contiguous() && !factors->is_neg(),
                   kOp, "factors", *factors, at::IntArrayRef(shape));
  const auto dtype = accumulation_dtype(texts);
  HIMO_CHECK_DTYPE(factors->scalar_type() == dtype, kOp, "factors", dtype, factors->scalar_type());
}

void check_values(const char* name, const at::Tensor& values, at::IntArrayRef shape) {
  HIMO_CHECK_CPU(kOp, name, values);
  HIMO_CHECK_SHAPE(values.sizes().equals(shape), kOp, name, values, shape);
}

// The logits of one of the two losses.
Optional products_of(const Optional& products, int64_t loss) {
  return products ? Optional(products->select(0, loss)) : std::nullopt;
}

// The problems of a batch, with the leading dimensions flattened.
class Problems {
 public:
  Problems(const at::Tensor& images, const at::Tensor& texts, Decomposition decomposition,
           const Optional& component_products, const Optional& factors)
      : images_(flatten_lead(images.resolve_neg(), 2)),
        texts_(flatten_lead(texts.resolve_neg(), 2)),
        decomposition_(std::move(decomposition)) {
    if (component_products) products_ = flatten_lead(*component_products, 2);
    if (factors) factors_ = flatten_lead(*factors, 1);
  }

  int64_t count() const { return images_.size(0); }
  at::Tensor images(int64_t b) const { return images_[b]; }
  cpu::Texts texts(int64_t b) const {
    const auto& [mean, eigenvalues, eigenvectors, rank] = decomposition_;
    return {texts_[b], mean.const_data_ptr<double>() + b * mean.size(1),
            cpu::Spectrum(eigenvalues, eigenvectors, rank, b)};
  }
  Optional products(int64_t b) const {
    return products_.defined() ? Optional(products_[b]) : std::nullopt;
  }
  at::Tensor cache(int64_t b) const { return factors_.defined() ? factors_[b] : factors_; }

 private:
  at::Tensor images_, texts_;
  Decomposition decomposition_;  // flat
  at::Tensor products_, factors_;
};

// With constant keys, V gets only the row half of dS. The basis is part of the texts, so it gets
// only the column half, as a block whose rows have weight 0. Both halves minus the row half would
// cancel where the columns are confident and the rows are not.
at::Tensor gradient_from_columns(const cpu::ComponentOperands& operands, const at::Tensor& scale,
                                 const at::Tensor& grad_loss, const at::Tensor& row_nll,
                                 const at::Tensor& column_nll, double label_smoothing,
                                 const Optional& products) {
  const auto& query = operands.query;
  const int64_t samples = query.size(0);
  const auto factor = scale.to(query.scalar_type());
  const auto pairs = products ? products->diagonal() : query.mul(operands.keys).sum(1);
  const auto positives = pairs.mul(factor);
  const auto weight =
      grad_loss.to(query.scalar_type()).div(2.0 * static_cast<double>(samples)).expand({samples});
  const auto [of_query, of_keys] = info_nce_block_bwd(
      query, operands.keys, scale, positives, row_nll, at::zeros_like(positives), positives,
      column_nll, weight, 0, label_smoothing, samples, /*differentiate_keys=*/true);
  return of_query.mul(factor);
}

}  // namespace

std::vector<int64_t> factors_shape(const at::Tensor& texts) {
  const int64_t samples = texts.size(-2), width = texts.size(-1);
  return with_tail(texts, {(2 * samples + width) * (std::min(samples, width) + 1)});
}

HimoLossOutputs himo_loss_fwd(const at::Tensor& images, const at::Tensor& texts,
                              const at::Tensor& logit_scale, double variance_threshold,
                              const Floor& floor, bool normalize_components, double label_smoothing,
                              const Optional& products, const Optional& factors) {
  const c10::NoGradGuard no_grad;
  check(images, texts, factors);
  const auto [mean, eigenvalues, eigenvectors, rank] =
      pca_decompose(texts, variance_threshold, floor);
  const auto [loss, row_nll, column_nll] =
      info_nce_fwd(images, texts, logit_scale, label_smoothing, products_of(products, 0));
  const auto component_loss = at::empty_like(loss), component_row_nll = at::empty_like(row_nll),
             component_column_nll = at::empty_like(column_nll);
  const Problems problems(images, texts,
                          flat_decomposition(kOp, texts, mean, eigenvalues, eigenvectors, rank),
                          products_of(products, 1), factors);
  const auto losses = flatten_lead(component_loss, 0), rows = flatten_lead(component_row_nll, 1),
             columns = flatten_lead(component_column_nll, 1);
  for (int64_t b = 0; b < problems.count(); ++b) {
    const auto operands = cpu::component_operands(problems.images(b), problems.texts(b),
                                                  normalize_components, problems.cache(b), false);
    const auto [own_loss, own_rows, own_columns] = info_nce_fwd(
        operands.query, operands.keys, logit_scale, label_smoothing, problems.products(b));
    losses[b].copy_(own_loss);
    rows[b].copy_(own_rows);
    columns[b].copy_(own_columns);
  }
  return {loss,
          row_nll,
          column_nll,
          component_loss,
          component_row_nll,
          component_column_nll,
          mean,
          eigenvalues,
          eigenvectors,
          rank};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> himo_loss_bwd(
    const at::Tensor& grad_contrastive_loss, const at::Tensor& grad_component_loss,
    const HimoLossSaved& saved, bool normalize_components, double label_smoothing,
    bool differentiate_keys, bool differentiate_basis, double gap_eps, bool needs_images,
    bool needs_texts, const Optional& products, const Optional& factors) {
  const c10::NoGradGuard no_grad;
  check(saved.images, saved.texts, factors);
  auto decomposition = flat_decomposition(kOp, saved.texts, saved.mean, saved.eigenvalues,
                                          saved.eigenvectors, saved.rank);
  check_values("grad_component_loss", grad_component_loss, with_tail(saved.texts, {}));
  const auto rows = with_tail(saved.texts, {saved.texts.size(-2)});
  check_values("component_row_nll", saved.component_row_nll, rows);
  check_values("component_column_nll", saved.component_column_nll, rows);
  auto [grad_images, grad_texts, grad_scale] =
      info_nce_bwd(grad_contrastive_loss, saved.images, saved.texts, saved.logit_scale,
                   saved.row_nll, saved.column_nll, label_smoothing, differentiate_keys,
                   needs_images, needs_texts, products_of(products, 0), std::nullopt);
  const Problems problems(saved.images, saved.texts, std::move(decomposition),
                          products_of(products, 1), factors);
  const auto grad_losses = flatten_lead(grad_component_loss, 0),
             row_nll = flatten_lead(saved.component_row_nll, 1),
             column_nll = flatten_lead(saved.component_column_nll, 1);
  for (int64_t b = 0; b < problems.count(); ++b) {
    const auto images = problems.images(b);
    const auto texts = problems.texts(b);
    const auto operands = cpu::component_operands(images, texts, normalize_components,
                                                  problems.cache(b), /*filled=*/true);
    const auto [of_query, of_keys, of_scale] = info_nce_bwd(
        grad_losses[b], operands.query, operands.keys, saved.logit_scale, row_nll[b], column_nll[b],
        label_smoothing, differentiate_keys, true, true, problems.products(b), std::nullopt);
    grad_scale.add_(of_scale);
    if (needs_images) {
      const auto own = flatten_lead(grad_images, 2)[b];
      if (operands.low_rank) {
        cpu::multiply(of_query, operands.factors.basis.to(of_query.scalar_type()), own, 1,
                      1);  // (5)
      } else {
        own.add_(of_query);
      }
    }
    if (!needs_texts) continue;
    const auto own = flatten_lead(grad_texts, 2)[b];
    if (texts.spectrum.is_nan()) {
      own.fill_(NAN);
    } else if (!operands.has_factors) {
      own.add_(normalize_components
                   ? normalize_bwd(of_keys, texts.features.to(of_keys.scalar_type()))
                   : of_keys);
    } else {
      const bool halves = operands.low_rank && !differentiate_keys;
      const auto of_basis =
          halves ? gradient_from_columns(operands, saved.logit_scale, grad_losses[b], row_nll[b],
                                         column_nll[b], label_smoothing, problems.products(b))
                 : of_query;
      cpu::add_text_gradient(
          {of_basis, of_keys, normalize_components, differentiate_basis, gap_eps}, images, texts,
          operands, own);
    }
  }
  return {grad_images, grad_texts, grad_scale};
}

}  // namespace himo
