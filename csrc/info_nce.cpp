#include "info_nce.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/ones.h>
#include <c10/core/GradMode.h>

#include <vector>

#include "common/check.h"
#include "common/shapes.h"
#include "cpu/info_nce_kernel.h"

namespace himo {
namespace {

constexpr const char* kOp = "info_nce";
// Terms that are summed at a time where a product needs less rounding. The rounding of 768 terms is
// then a quarter of that of one sum over all, and the time the same.
constexpr int64_t kPart = 32;

void check_features(const at::Tensor& query, const at::Tensor& key, const at::Tensor& logit_scale) {
  HIMO_CHECK_CPU(kOp, "query", query);
  HIMO_CHECK_CPU(kOp, "key", key);
  HIMO_CHECK_CPU(kOp, "logit_scale", logit_scale);
  const auto dtype = query.scalar_type();
  HIMO_CHECK_DTYPE(at::isFloatingType(dtype) && !at::isFloat8Type(dtype), kOp, "query",
                   "float16, bfloat16, float32 or float64", dtype);
  HIMO_CHECK_DTYPE(key.scalar_type() == dtype, kOp, "key", "of query's dtype", key.scalar_type());
  HIMO_CHECK_SHAPE(query.dim() >= 2 && query.size(-2) > 0, kOp, "query", query, "[*, N, K], N > 0");
  HIMO_CHECK_SHAPE(logit_scale.dim() == 0, kOp, "logit_scale", logit_scale, "[]");
}

void check_pairs(const at::Tensor& query, const at::Tensor& key) {
  HIMO_CHECK_SHAPE(key.sizes().equals(query.sizes()), kOp, "key", key, query.sizes());
}

// Checks that values has one entry per row of features [M, K]; returns it contiguous and in the
// accumulation dtype.
at::Tensor vector_of(const char* name, const at::Tensor& values, const at::Tensor& features) {
  HIMO_CHECK_CPU(kOp, name, values);
  HIMO_CHECK_SHAPE(values.dim() == 1 && values.size(0) == features.size(0), kOp, name, values,
                   at::IntArrayRef{features.size(0)});
  return values.to(accumulation_dtype(features)).resolve_neg().contiguous();
}

cpu::InfoNCE block_of(const at::Tensor& query, const at::Tensor& key, const at::Tensor& logit_scale,
                      const at::Tensor& row_positives, const at::Tensor& column_positives,
                      int64_t offset) {
  check_features(query, key, logit_scale);
  HIMO_CHECK_SHAPE(query.dim() == 2, kOp, "query", query, "[M, K]");
  HIMO_CHECK_SHAPE(key.dim() == 2 && key.size(0) > 0 && key.size(1) == query.size(1), kOp, "key",
                   key, "[N, K], N > 0");
  cpu::InfoNCE block;
  block.query = query.resolve_neg();
  block.key = key.resolve_neg();
  block.offset = offset;
  block.row_positives = vector_of("row_positives", row_positives, query);
  block.column_positives = vector_of("column_positives", column_positives, key);
  return block;
}

// Splits the leading dimensions into problems, whose features are views [N, K].
std::vector<cpu::InfoNCE> problems_of(const at::Tensor& query, const at::Tensor& key,
                                      const at::Tensor& positives, const at::Tensor& row_nll,
                                      const at::Tensor& column_nll,
                                      const std::optional<at::Tensor>& products) {
  const auto lead = query.sizes().slice(0, query.dim() - 2);
  const int64_t count = c10::multiply_integers(lead);
  const auto of_problem = [&](const at::Tensor& values, int64_t b, int64_t tail_dims) {
    // Without leading dimensions no view is made, because views take long beside a small loss.
    return lead.empty() ? values : flatten_lead(values, tail_dims).select(0, b);
  };
  std::vector<cpu::InfoNCE> problems(count);
  for (int64_t b = 0; b < count; ++b) {
    auto one_query = query, one_key = key;
    int64_t index = b, stride = count;
    for (const int64_t size : lead) {  // select always gives a view; reshape could copy
      stride /= size;
      one_query = one_query.select(0, index / stride);
      one_key = one_key.select(0, index / stride);
      index %= stride;
    }
    problems[b].query = one_query.resolve_neg();
    problems[b].key = one_key.resolve_neg();
    if (positives.defined()) problems[b].positives = of_problem(positives, b, 1);
    problems[b].row_nll = of_problem(row_nll, b, 1);
    problems[b].column_nll = of_problem(column_nll, b, 1);
    if (products) problems[b].products = of_problem(*products, b, 2);
  }
  return problems;
}

// In float64, in the order of the values. A tensor operation would take longer than a small loss.
double sum_of(const at::Tensor& values) {  // [N] acc, contiguous
  const auto sum = [](const auto* data, int64_t size) {
    double total = 0;
    for (int64_t i = 0; i < size; ++i) total += static_cast<double>(data[i]);
    return total;
  };
  if (values.scalar_type() == at::kDouble) {
    return sum(values.const_data_ptr<double>(), values.numel());
  }
  return sum(values.const_data_ptr<float>(), values.numel());
}

// mean_ij S_ij [*] in O(N K): sum_ij v_i . u_j = (sum_i v_i) . (sum_j u_j).
at::Tensor mean_logit(const at::Tensor& query, const at::Tensor& key, double scale) {
  const auto dtype = accumulation_dtype(query);
  const double samples = query.size(-2);
  const auto ones = at::ones({1, query.size(-2)}, query.options().dtype(dtype));
  const auto query_sum = at::matmul(ones, query.to(dtype)),
             key_sum = at::matmul(ones, key.to(dtype));
  return query_sum.mul(key_sum).sum({-2, -1}, false, at::kDouble).mul(scale / (samples * samples));
}

// Returns loss [*] and both nlls [*, N].
std::tuple<at::Tensor, at::Tensor, at::Tensor> forward(const at::Tensor& query,
                                                       const at::Tensor& key, double scale,
                                                       double label_smoothing,
                                                       const std::optional<at::Tensor>& products,
                                                       bool formed) {
  const auto dtype = accumulation_dtype(query);
  const auto options = query.options().dtype(dtype);
  const auto rows = query.sizes().slice(0, query.dim() - 1);
  const auto row_nll = at::empty(rows, options), column_nll = at::empty(rows, options);
  const auto positives = at::empty(rows, options);
  const auto problems = problems_of(query, key, positives, row_nll, column_nll, products);
  cpu::info_nce_statistics(problems, scale, formed);
  // HiMo-CLIP eq. (2); both directions share the smoothing term. An infinite positive times a
  // smoothing of 0 is NaN, so the loss of infinite features is never finite.
  const auto loss = at::empty(query.sizes().slice(0, query.dim() - 2), options.dtype(at::kDouble));
  const auto samples = static_cast<double>(query.size(-2));
  for (size_t b = 0; b < problems.size(); ++b) {
    const double nll = sum_of(problems[b].row_nll) + sum_of(problems[b].column_nll);
    loss.mutable_data_ptr<double>()[b] =
        (nll / 2 + label_smoothing * sum_of(problems[b].positives)) / samples;
  }
  if (label_smoothing != 0) loss.sub_(mean_logit(query, key, scale), label_smoothing);
  return {loss.to(dtype), row_nll, column_nll};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> info_nce_fwd(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& logit_scale,
    double label_smoothing, const std::optional<at::Tensor>& products) {
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  check_features(query, key, logit_scale);
  check_pairs(query, key);
  check_products(kOp, products, query, key);
  const double scale = logit_scale.to(accumulation_dtype(query)).item<double>();
  return forward(query, key, scale, label_smoothing, products, /*formed=*/false);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> info_nce_fwd_of_products(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& logit_scale,
    double label_smoothing, const at::Tensor& products) {
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  check_features(query, key, logit_scale);
  check_pairs(query, key);
  check_products(kOp, products, query, key);
  const double scale = logit_scale.to(accumulation_dtype(query)).item<double>();
  return forward(query, key, scale, label_smoothing, products, /*formed=*/true);
}

void info_nce_products(const at::Tensor& query, const at::Tensor& key, const at::Tensor& products,
                       const std::vector<bool>& exact) {
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  check_pairs(query, key);
  check_products(kOp, products, query, key);
  const auto rows = query.sizes().slice(0, query.dim() - 1);
  const auto nll = at::empty(rows, products.options());
  auto problems = problems_of(query, key, /*positives=*/{}, nll, nll, products);
  for (size_t b = 0; b < problems.size(); ++b) problems[b].part = exact[b] ? kPart : 0;
  cpu::info_nce_products(problems);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> info_nce_bwd(
    const at::Tensor& grad_loss, const at::Tensor& query, const at::Tensor& key,
    const at::Tensor& logit_scale, const at::Tensor& row_nll, const at::Tensor& column_nll,
    double label_smoothing, bool differentiate_keys, bool needs_query, bool needs_key,
    const std::optional<at::Tensor>& products, const std::optional<at::Tensor>& query_sum) {
  return info_nce_bwd_with({}, grad_loss, query, key, logit_scale, row_nll, column_nll,
                           label_smoothing, differentiate_keys, needs_query, needs_key, products,
                           query_sum);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> info_nce_bwd_with(
    const OtherLoss& other, const at::Tensor& grad_loss, const at::Tensor& query,
    const at::Tensor& key, const at::Tensor& logit_scale, const at::Tensor& row_nll,
    const at::Tensor& column_nll, double label_smoothing, bool differentiate_keys, bool needs_query,
    bool needs_key, const std::optional<at::Tensor>& products,
    const std::optional<at::Tensor>& query_sum) {
  const c10::NoGradGuard no_grad;
  check_features(query, key, logit_scale);
  check_pairs(query, key);
  const auto dtype = accumulation_dtype(query);
  const auto options = query.options().dtype(dtype);
  const auto rows = query.sizes().slice(0, query.dim() - 1);
  const auto lead = query.sizes().slice(0, query.dim() - 2);
  HIMO_CHECK_CPU(kOp, "grad_loss", grad_loss);
  HIMO_CHECK_SHAPE(grad_loss.sizes().equals(lead), kOp, "grad_loss", grad_loss, lead);
  HIMO_CHECK_CPU(kOp, "row_nll", row_nll);
  HIMO_CHECK_SHAPE(row_nll.sizes().equals(rows), kOp, "row_nll", row_nll, rows);
  HIMO_CHECK_CPU(kOp, "column_nll", column_nll);
  HIMO_CHECK_SHAPE(column_nll.sizes().equals(rows), kOp, "column_nll", column_nll, rows);
  check_products(kOp, products, query, key);
  if (query_sum) {
    HIMO_CHECK_CPU(kOp, "query_sum", *query_sum);
    HIMO_CHECK_SHAPE(query_sum->sizes().equals(query.sizes()) && query_sum->is_contiguous(), kOp,
                     "query_sum", *query_sum, query.sizes());
    HIMO_CHECK_DTYPE(query_sum->scalar_type() == dtype, kOp, "query_sum", dtype,
                     query_sum->scalar_type());
  }

  const auto gradient = [&](bool needed) {
    return needed ? at::empty(query.sizes(), options) : at::empty({0}, options);
  };
  const auto grad_query = query_sum ? *query_sum : gradient(needs_query);
  const auto grad_key = gradient(needs_key);
  const auto row = row_nll.to(dtype).resolve_neg().contiguous();
  const auto column = column_nll.to(dtype).resolve_neg().contiguous();
  const double scale = logit_scale.to(dtype).item<double>();
  auto problems = problems_of(query, key, /*positives=*/{}, row, column, products);
  const int64_t count = problems.size(), samples = query.size(-2), inner = query.size(-1);
  const auto weights =
      grad_loss.to(at::kDouble).reshape({count}).div(2.0 * samples).resolve_neg().contiguous();
  for (int64_t b = 0; b < count; ++b) {
    problems[b].row_weight = at::full({samples}, weights.const_data_ptr<double>()[b], options);
    problems[b].column_weight = problems[b].row_weight;
    if (other.for_query.defined()) {
      problems[b].for_query = other.for_query.view({count, samples, samples})[b];
      problems[b].row_sums = other.row_sums.view({count, samples})[b];
    }
    if (other.for_key.defined()) {
      problems[b].for_key = other.for_key.view({count, samples, samples})[b];
    }
    if (needs_query) problems[b].grad_query = grad_query.view({count, samples, inner})[b];
    if (needs_key) problems[b].grad_key = grad_key.view({count, samples, inner})[b];
  }
  const double grad_scale = cpu::info_nce_gradients(
      problems, {scale, label_smoothing, differentiate_keys, samples, /*factor=*/scale,
                 /*add_to_query=*/query_sum.has_value()});
  return {grad_query, grad_key, at::full({}, grad_scale, options)};
}

std::tuple<at::Tensor, at::Tensor> info_nce_block_fwd(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& logit_scale,
    const at::Tensor& row_positives, const at::Tensor& column_positives, int64_t offset) {
  const c10::NoGradGuard no_grad;
  auto block = block_of(query, key, logit_scale, row_positives, column_positives, offset);
  const auto dtype = accumulation_dtype(query);
  block.row_nll = at::empty({query.size(0)}, query.options().dtype(dtype));
  block.column_nll = at::empty({key.size(0)}, query.options().dtype(dtype));
  cpu::info_nce_statistics({block}, logit_scale.to(dtype).item<double>());
  return {block.row_nll, block.column_nll};
}

std::tuple<at::Tensor, at::Tensor> info_nce_block_bwd(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& logit_scale,
    const at::Tensor& row_positives, const at::Tensor& row_nll, const at::Tensor& row_weight,
    const at::Tensor& column_positives, const at::Tensor& column_nll,
    const at::Tensor& column_weight, int64_t offset, double label_smoothing, int64_t total,
    bool differentiate_keys) {
  const c10::NoGradGuard no_grad;
  auto block = block_of(query, key, logit_scale, row_positives, column_positives, offset);
  const auto options = query.options().dtype(accumulation_dtype(query));
  block.row_nll = vector_of("row_nll", row_nll, query);
  block.row_weight = vector_of("row_weight", row_weight, query);
  block.column_nll = vector_of("column_nll", column_nll, key);
  block.column_weight = vector_of("column_weight", column_weight, key);
  block.grad_query = at::empty(query.sizes(), options);
  block.grad_key = at::empty(key.sizes(), options);
  const double scale = logit_scale.to(options.dtype()).item<double>();
  cpu::info_nce_gradients({block}, {scale, label_smoothing, differentiate_keys, total, /*factor=*/1,
                                    /*add_to_query=*/false});
  return {block.grad_query, block.grad_key};
}

}  // namespace himo
