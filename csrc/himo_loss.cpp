#include "himo_loss.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

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

// The products of one of the two losses.
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

// The products V X^T of a batch, if any of its problems share them; README (11). A problem that
// does not has X = U and mu = 0 here, so that its contrastive loss is computed as without.
class Sharing {
 public:
  // If `filled`, the cache [*, N, N] has the products, else they are written there.
  Sharing(const at::Tensor& images, const at::Tensor& texts, const Problems& problems,
          const Optional& cache, bool filled)
      : shares_(problems.count()) {
    bool any = false;
    for (int64_t b = 0; b < problems.count(); ++b) {
      shares_[b] = cpu::shares_products(problems.texts(b));
      any = any || shares_[b];
    }
    if (!any) return;
    std::vector<at::Tensor> keys;
    for (int64_t b = 0; b < problems.count(); ++b) {
      const auto own = problems.texts(b);
      keys.push_back(shares_[b] ? cpu::centred_texts(own) : own.features);
    }
    keys_ = texts.dim() == 2 ? keys[0] : at::stack(keys).view(texts.sizes());
    const auto shape = with_tail(images, {images.size(-2), images.size(-2)});
    const auto products = cache ? *cache : at::empty(shape, images.options());
    if (!cache || !filled) info_nce_products(images, keys_, products, shares_);
    logits_ = at::empty(shape, images.options());
    const auto logits = flatten_lead(logits_, 2), each = flatten_lead(products, 2);
    for (int64_t b = 0; b < problems.count(); ++b) {
      problems_.push_back({flatten_lead(keys_, 2)[b], each[b], {}});
      if (shares_[b]) {
        problems_[b].along_mean = cpu::products_with_mean(problems.images(b), problems.texts(b));
      }
      cpu::write_logits(problems_[b], logits[b]);
    }
  }

  explicit operator bool() const { return logits_.defined(); }
  bool operator[](int64_t b) const { return shares_[b]; }
  const cpu::SharedProducts& problem(int64_t b) const { return problems_[b]; }
  const at::Tensor& keys() const { return keys_; }      // X [*, N, D]
  const at::Tensor& logits() const { return logits_; }  // V X^T + V mu 1^T [*, N, N]

 private:
  std::vector<bool> shares_;
  std::vector<cpu::SharedProducts> problems_;
  at::Tensor keys_, logits_;
};

cpu::ComponentOperands operands_of(const Problems& problems, const Sharing& sharing, int64_t b,
                                   bool normalize, bool filled) {
  if (sharing[b]) {
    return cpu::operands_from_products(sharing.problem(b), problems.texts(b), normalize);
  }
  return cpu::component_operands(problems.images(b), problems.texts(b), normalize,
                                 problems.cache(b), filled);
}

// A component loss, with what its backward needs.
struct ComponentLoss {
  at::Tensor scale, grad_loss, row_nll, column_nll;
  double label_smoothing;
  bool differentiate_keys;
  Optional products;
};

// With constant keys, V gets only the row half of dS. The basis is part of the texts, so it gets
// only the column half, as a block whose rows have weight 0. Both halves minus the row half would
// cancel where the columns are confident and the rows are not.
at::Tensor gradient_from_columns(const cpu::ComponentOperands& operands,
                                 const ComponentLoss& loss) {
  const auto& query = operands.query;
  const int64_t samples = query.size(0);
  const auto factor = loss.scale.to(query.scalar_type());
  const auto pairs = loss.products ? loss.products->diagonal() : query.mul(operands.keys).sum(1);
  const auto positives = pairs.mul(factor);
  const auto weight = loss.grad_loss.to(query.scalar_type())
                          .div(2.0 * static_cast<double>(samples))
                          .expand({samples});
  const auto [of_query, of_keys] = info_nce_block_bwd(
      query, operands.keys, loss.scale, positives, loss.row_nll, at::zeros_like(positives),
      positives, loss.column_nll, weight, 0, loss.label_smoothing, samples,
      /*differentiate_keys=*/true);
  return of_query.mul(factor);
}

// The gradients of the operands of a component loss, and that of the query for the basis; (4).
struct ComponentGradient {
  cpu::ComponentOperands operands;
  at::Tensor of_query, of_keys, of_scale, of_basis;
};

ComponentGradient gradient_of(cpu::ComponentOperands operands, const ComponentLoss& loss,
                              bool needs_texts) {
  auto [of_query, of_keys, of_scale] = info_nce_bwd(
      loss.grad_loss, operands.query, operands.keys, loss.scale, loss.row_nll, loss.column_nll,
      loss.label_smoothing, loss.differentiate_keys, true, true, loss.products, std::nullopt);
  const bool halves = operands.low_rank && !loss.differentiate_keys && needs_texts;
  auto of_basis = halves ? gradient_from_columns(operands, loss) : of_query;
  return {std::move(operands), of_query, of_keys, of_scale, of_basis};
}

// The backward of the contrastive loss with what the given component losses add through the
// products; (14).
std::tuple<at::Tensor, at::Tensor, at::Tensor> contrastive_bwd(
    const at::Tensor& grad_loss, const HimoLossSaved& saved, double label_smoothing,
    bool differentiate_keys, bool differentiate_basis, bool needs_images, bool needs_texts,
    const Problems& problems, const Sharing& sharing,
    const std::vector<std::optional<ComponentGradient>>& component) {
  OtherLoss other;
  other.for_query = at::zeros(sharing.logits().sizes(), sharing.logits().options());
  if (needs_texts && !(differentiate_keys && differentiate_basis)) {
    other.for_key = at::zeros_like(other.for_query);
  }
  other.row_sums = at::zeros(saved.row_nll.sizes(), at::kDouble);
  const auto for_query = flatten_lead(other.for_query, 2);
  const auto for_key = other.for_key.defined() ? flatten_lead(other.for_key, 2) : at::Tensor();
  for (int64_t b = 0; b < problems.count(); ++b) {
    if (!component[b]) continue;
    const auto& own = *component[b];
    cpu::write_gradient_of_products(own.of_query, own.operands, true, for_query[b]);
    if (!for_key.defined()) continue;
    cpu::write_gradient_of_products(own.of_basis, own.operands, differentiate_basis, for_key[b]);
  }
  auto gradients =
      info_nce_bwd_with(other, grad_loss, saved.images, sharing.keys(), saved.logit_scale,
                        saved.row_nll, saved.column_nll, label_smoothing, differentiate_keys,
                        needs_images, needs_texts, sharing.logits(), std::nullopt);
  if (!needs_images) return gradients;
  const auto of_images = flatten_lead(std::get<0>(gradients), 2),
             row_sums = flatten_lead(other.row_sums, 1);
  for (int64_t b = 0; b < problems.count(); ++b) {
    if (!component[b]) continue;
    const auto& of_query = component[b]->of_query;
    cpu::add_along_mean(row_sums[b].add(of_query.select(1, of_query.size(1) - 1)),
                        problems.texts(b), of_images[b]);
  }
  return gradients;
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
  const Problems problems(images, texts,
                          flat_decomposition(kOp, texts, mean, eigenvalues, eigenvectors, rank),
                          products_of(products, 1), factors);
  const Sharing sharing(images, texts, problems, products_of(products, 0), /*filled=*/false);
  const auto [loss, row_nll, column_nll] =
      sharing
          ? info_nce_fwd_of_products(images, texts, logit_scale, label_smoothing, sharing.logits())
          : info_nce_fwd(images, texts, logit_scale, label_smoothing, products_of(products, 0));
  const auto component_loss = at::empty_like(loss), component_row_nll = at::empty_like(row_nll),
             component_column_nll = at::empty_like(column_nll);
  const auto losses = flatten_lead(component_loss, 0), rows = flatten_lead(component_row_nll, 1),
             columns = flatten_lead(component_column_nll, 1);
  for (int64_t b = 0; b < problems.count(); ++b) {
    const auto operands = operands_of(problems, sharing, b, normalize_components, /*filled=*/false);
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
  const Problems problems(saved.images, saved.texts, std::move(decomposition),
                          products_of(products, 1), factors);
  const Sharing sharing(saved.images, saved.texts, problems, products_of(products, 0),
                        /*filled=*/true);
  const auto grad_losses = flatten_lead(grad_component_loss, 0),
             row_nll = flatten_lead(saved.component_row_nll, 1),
             column_nll = flatten_lead(saved.component_column_nll, 1);
  const auto component_gradient = [&](int64_t b) {
    return gradient_of(operands_of(problems, sharing, b, normalize_components, /*filled=*/true),
                       {saved.logit_scale, grad_losses[b], row_nll[b], column_nll[b],
                        label_smoothing, differentiate_keys, problems.products(b)},
                       needs_texts);
  };
  std::vector<std::optional<ComponentGradient>> shared(problems.count());
  for (int64_t b = 0; b < problems.count(); ++b) {
    if (sharing[b]) shared[b] = component_gradient(b);
  }
  auto [grad_images, grad_texts, grad_scale] =
      sharing ? contrastive_bwd(grad_contrastive_loss, saved, label_smoothing, differentiate_keys,
                                differentiate_basis, needs_images, needs_texts, problems, sharing,
                                shared)
              : info_nce_bwd(grad_contrastive_loss, saved.images, saved.texts, saved.logit_scale,
                             saved.row_nll, saved.column_nll, label_smoothing, differentiate_keys,
                             needs_images, needs_texts, products_of(products, 0), std::nullopt);
  for (int64_t b = 0; b < problems.count(); ++b) {
    const auto images = problems.images(b);
    const auto texts = problems.texts(b);
    const auto [operands, of_query, of_keys, of_scale, of_basis] =
        sharing[b] ? std::move(*shared[b]) : component_gradient(b);
    const cpu::TextGradient of_texts{of_basis, of_keys, normalize_components, differentiate_basis,
                                     gap_eps};
    grad_scale.add_(of_scale);
    if (needs_images && !sharing[b]) {
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
    } else if (sharing[b]) {
      cpu::add_text_gradient_from_products(of_texts, images, sharing.problem(b).products, texts,
                                           operands, own);
    } else {
      cpu::add_text_gradient(of_texts, images, texts, operands, own);
    }
  }
  return {grad_images, grad_texts, grad_scale};
}

}  // namespace himo
