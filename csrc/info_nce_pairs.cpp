#include "info_nce_pairs.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>

#include "common/check.h"
#include "common/shapes.h"
#include "cpu/info_nce_kernel.h"
#include "cpu/row_products.h"

namespace himo {
namespace {

constexpr const char* kOp = "info_nce_pairs";
constexpr size_t kOfLosses = 5, kOfGradients = 7;  // tensors of a side

// Checks values [*, n]; returns them as [B, n], contiguous.
at::Tensor checked(const char* name, const at::Tensor& values, const at::Tensor& features,
                   at::ScalarType dtype) {
  HIMO_CHECK_CPU(kOp, name, values);
  const auto shape = features.sizes().slice(0, features.dim() - 1);
  HIMO_CHECK_SHAPE(values.sizes().equals(shape), kOp, name, values, shape);
  HIMO_CHECK_DTYPE(values.scalar_type() == dtype, kOp, name, dtype, values.scalar_type());
  return flatten_lead(values, 1).resolve_neg().contiguous();
}

// A side as [B, n] tensors: keys, single, reference, target, share, log, weight.
std::vector<at::Tensor> checked_side(const char* name, const PairSideTensors& side,
                                     const at::Tensor& features, size_t losses) {
  TORCH_CHECK_VALUE(side.size() == losses || (side.size() == 1 && name[0] == 'c'), kOp,
                    ": expected ", name, " to be ", losses, " tensors, got ", side.size());
  std::vector<at::Tensor> result;
  for (size_t i = 0; i < side.size(); ++i) {
    const auto dtype = i < 2 ? at::kInt : accumulation_dtype(features);
    result.push_back(checked(name, side[i], features, dtype));
  }
  return result;
}

// Checks the features of rows [*, N, K] and of columns [*, M, K].
void check_tables(const char* name, const at::Tensor& rows, const char* other_name,
                  const at::Tensor& columns) {
  check_features(kOp, name, rows);
  check_features(kOp, other_name, columns);
  HIMO_CHECK_SHAPE(rows.size(-2) > 0, kOp, name, rows, "[*, N, K], N > 0");
  HIMO_CHECK_DTYPE(columns.scalar_type() == rows.scalar_type(), kOp, other_name, rows.scalar_type(),
                   columns.scalar_type());
  const auto shape = with_tail(rows, {columns.size(-2), rows.size(-1)});
  HIMO_CHECK_SHAPE(columns.size(-2) > 0 && columns.sizes().equals(shape), kOp, other_name, columns,
                   "[*, M, K], M > 0");
}

struct Call {
  at::Tensor query, key;  // [B, N, K], [B, M, K]
  double scale;
  bool of_columns;
  std::vector<cpu::InfoNCE> problems;
};

Call call_of(const at::Tensor& query, const at::Tensor& key, const at::Tensor& logit_scale,
             const PairSideTensors& rows, const PairSideTensors& columns,
             const std::optional<at::Tensor>& row_labels,
             const std::optional<at::Tensor>& column_labels, bool exclude_self,
             const std::optional<at::Tensor>& products, size_t losses) {
  check_tables("query", query, "key", key);
  HIMO_CHECK_CPU(kOp, "logit_scale", logit_scale);
  HIMO_CHECK_SHAPE(logit_scale.dim() == 0, kOp, "logit_scale", logit_scale, "[]");
  check_products(kOp, products, query, key);
  const auto dtype = accumulation_dtype(query);
  Call call{flatten_lead(query, 2),
            flatten_lead(key, 2),
            logit_scale.to(dtype).item<double>(),
            columns.size() > 1,
            {}};
  const auto own = checked_side("rows", rows, query, losses);
  const auto others = checked_side("columns", columns, key, losses);
  at::Tensor own_labels, other_labels;
  TORCH_CHECK_VALUE(row_labels.has_value() == column_labels.has_value(), kOp,
                    ": expected labels of rows and columns, got one of them");
  if (row_labels) {
    own_labels = checked("row_labels", *row_labels, query, at::kInt);
    other_labels = checked("column_labels", *column_labels, key, at::kInt);
  }
  for (int64_t b = 0; b < call.query.size(0); ++b) {
    cpu::InfoNCE problem;
    problem.query = call.query[b].resolve_neg();
    problem.key = call.key[b].resolve_neg();
    if (products) problem.products = flatten_lead(*products, 2)[b];
    problem.exclude_self = exclude_self;
    const auto fill = [b](const std::vector<at::Tensor>& from, const at::Tensor& labels,
                          cpu::InfoNCESide& side, at::Tensor& reference, at::Tensor& log,
                          at::Tensor& weight) {
      side.keys = from[0][b];
      if (labels.defined()) side.labels = labels[b];
      if (from.size() == 1) return;
      side.single = from[1][b];
      reference = from[2][b];
      side.target = from[3][b];
      side.share = from[4][b];
      if (from.size() < kOfGradients) return;
      log = from[5][b];
      weight = from[6][b];
    };
    fill(own, own_labels, problem.rows, problem.row_positives, problem.row_nll, problem.row_weight);
    fill(others, other_labels, problem.columns, problem.column_positives, problem.column_nll,
         problem.column_weight);
    call.problems.push_back(problem);
  }
  return call;
}

}  // namespace

at::Tensor row_products(const at::Tensor& x, const at::Tensor& y, const at::Tensor& places) {
  const c10::NoGradGuard no_grad;
  check_tables("x", x, "y", y);
  const auto own = checked("places", places, x, at::kLong);
  const int64_t others = y.size(-2);
  const auto* place = own.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < own.numel(); ++i) {
    TORCH_CHECK_VALUE(place[i] >= 0 && place[i] < others, kOp, ": expected places in [0, ", others,
                      "), got ", place[i]);
  }
  const auto products = at::empty(places.sizes(), x.options().dtype(accumulation_dtype(x)));
  cpu::row_products(x.resolve_neg(), y.resolve_neg(), own, products);
  return products;
}

std::vector<at::Tensor> info_nce_pairs_fwd(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& logit_scale,
    const PairSideTensors& rows, const PairSideTensors& columns,
    const std::optional<at::Tensor>& row_labels, const std::optional<at::Tensor>& column_labels,
    bool exclude_self, double label_smoothing, const std::optional<at::Tensor>& products) {
  const c10::NoGradGuard no_grad;
  auto call = call_of(query, key, logit_scale, rows, columns, row_labels, column_labels,
                      exclude_self, products, kOfLosses);
  const auto options = query.options().dtype(accumulation_dtype(query));
  const auto of_rows = query.sizes().slice(0, query.dim() - 1);
  const auto of_columns = key.sizes().slice(0, key.dim() - 1);
  std::vector<at::Tensor> result{at::empty(of_rows, options), at::empty(of_rows, options)};
  if (call.of_columns) {
    result.push_back(at::empty(of_columns, options));
    result.push_back(at::empty(of_columns, options));
  }
  for (size_t b = 0; b < call.problems.size(); ++b) {
    auto& problem = call.problems[b];
    problem.row_nll = flatten_lead(result[0], 1)[b];
    problem.rows.total = flatten_lead(result[1], 1)[b];
    if (!call.of_columns) continue;
    problem.column_nll = flatten_lead(result[2], 1)[b];
    problem.columns.total = flatten_lead(result[3], 1)[b];
  }
  cpu::info_nce_pairs_statistics(call.problems, call.scale, label_smoothing);
  return result;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> info_nce_pairs_bwd(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& logit_scale,
    const PairSideTensors& rows, const PairSideTensors& columns,
    const std::optional<at::Tensor>& row_labels, const std::optional<at::Tensor>& column_labels,
    bool exclude_self, double label_smoothing, const std::optional<at::Tensor>& products,
    bool needs_query, bool needs_key) {
  const c10::NoGradGuard no_grad;
  auto call = call_of(query, key, logit_scale, rows, columns, row_labels, column_labels,
                      exclude_self, products, kOfGradients);
  const auto options = query.options().dtype(accumulation_dtype(query));
  // The kernel rounds the gradients of bfloat16 where it multiplies bfloat16.
  const bool rounds = query.scalar_type() == at::kBFloat16 && cpu::multiplies_bfloat16();
  const auto of_gradients = rounds ? options.dtype(at::kBFloat16) : options;
  const auto gradient = [&](const at::Tensor& features, bool needed) {
    return needed ? at::empty(features.sizes(), of_gradients) : at::empty({0}, of_gradients);
  };
  const auto grad_query = gradient(query, needs_query), grad_key = gradient(key, needs_key);
  for (size_t b = 0; b < call.problems.size(); ++b) {
    auto& problem = call.problems[b];
    if (needs_query) problem.grad_query = flatten_lead(grad_query, 2)[b];
    if (needs_key) problem.grad_key = flatten_lead(grad_key, 2)[b];
  }
  const double grad_scale =
      cpu::info_nce_pairs_gradients(call.problems, call.scale, label_smoothing);
  return {grad_query, grad_key, at::full({}, grad_scale, options)};
}

}  // namespace himo
