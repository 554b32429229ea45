#include "sigmoid_loss.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/GradMode.h>

#include <vector>

#include "common/check.h"
#include "common/shapes.h"
#include "cpu/sigmoid_loss_kernel.h"

namespace himo {
namespace {

constexpr const char* kOp = "sigmoid_loss";

void check(const at::Tensor& query, const at::Tensor& key, const at::Tensor& logit_scale,
           const at::Tensor& logit_bias) {
  check_features(kOp, "query", query);
  check_features(kOp, "key", key);
  HIMO_CHECK_SHAPE(query.size(-2) > 0, kOp, "query", query, "[*, M, K], M > 0");
  const auto keys = with_tail(query, {key.size(-2), query.size(-1)});
  HIMO_CHECK_SHAPE(key.size(-2) > 0 && key.sizes().equals(keys), kOp, "key", key,
                   "[*, N, K], N > 0");
  HIMO_CHECK_DTYPE(key.scalar_type() == query.scalar_type(), kOp, "key", query.scalar_type(),
                   key.scalar_type());
  HIMO_CHECK_CPU(kOp, "logit_scale", logit_scale);
  HIMO_CHECK_SHAPE(logit_scale.dim() == 0, kOp, "logit_scale", logit_scale, "[]");
  HIMO_CHECK_CPU(kOp, "logit_bias", logit_bias);
  HIMO_CHECK_SHAPE(logit_bias.dim() == 0, kOp, "logit_bias", logit_bias, "[]");
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> sigmoid_loss_fwd(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& logit_scale,
    const at::Tensor& logit_bias, int64_t offset, double divisor, bool needs_query, bool needs_key,
    bool needs_scalars) {
  const c10::NoGradGuard no_grad;
  check(query, key, logit_scale, logit_bias);
  const auto dtype = accumulation_dtype(query);
  const auto options = query.options().dtype(dtype);
  const auto grad_query = needs_query ? at::empty(query.sizes(), options) : at::empty({0}, options);
  const auto grad_key = needs_key ? at::empty(key.sizes(), options) : at::empty({0}, options);
  const auto queries = flatten_lead(query.resolve_neg(), 2);
  const auto keys = flatten_lead(key.resolve_neg(), 2);
  std::vector<cpu::Logits> problems(queries.size(0));
  for (size_t b = 0; b < problems.size(); ++b) {
    problems[b].query = queries.select(0, b);
    problems[b].key = keys.select(0, b);
    if (needs_query) problems[b].grad_query = flatten_lead(grad_query, 2).select(0, b);
    if (needs_key) problems[b].grad_key = flatten_lead(grad_key, 2).select(0, b);
  }
  const auto sums = cpu::sigmoid_loss(
      problems, {logit_scale.to(dtype).item<double>(), logit_bias.to(dtype).item<double>(), offset,
                 divisor, needs_query || needs_key || needs_scalars});
  const auto of_each = [&](double cpu::SigmoidSums::* part) {
    const auto values = at::empty(with_tail(query, {}), options.dtype(at::kDouble));
    auto* data = values.mutable_data_ptr<double>();
    for (size_t b = 0; b < sums.size(); ++b) data[b] = sums[b].*part;
    return values.to(dtype);
  };
  return {of_each(&cpu::SigmoidSums::loss), grad_query, grad_key, of_each(&cpu::SigmoidSums::scale),
          of_each(&cpu::SigmoidSums::bias)};
}

}  // namespace himo
