// InfoNCE of any pairs: one direction or both, several positives, exclusions. A tile decides about
// its pairs by comparing integers. The passes are in logit_statistics.h and logit_gradients.h.

#include <ATen/core/Tensor.h>
#include <ATen/ops/expm1.h>

#include <cmath>
#include <numeric>
#include <vector>

#include "common/interrupt.h"
#include "cpu/info_nce_factors.h"
#include "cpu/info_nce_kernel.h"
#include "cpu/logit_gradients.h"
#include "cpu/logit_statistics.h"
#include "cpu/pair_loops.h"

namespace himo::cpu {
namespace {

const auto& pair_loops_of(float) { return pair_loops().float32; }
const auto& pair_loops_of(double) { return pair_loops().float64; }

// The tensors of a side as the loops read them: integers as wide as numbers, columns padded.
template <typename acc_t>
class Side {
 public:
  using integer_t = typename LaneInteger<acc_t>::type;

  Side(const InfoNCESide& side, const at::Tensor& reference, const at::Tensor& log,
       const at::Tensor& weight, double label_smoothing, bool is_padded)
      : is_padded_(is_padded) {
    keys_ = laid_out(side.keys, c10::CppTypeToScalarType<integer_t>::value);
    labels_ = laid_out(side.labels, c10::CppTypeToScalarType<integer_t>::value);
    if (!side.single.defined()) return;
    single_ = laid_out(side.single, c10::CppTypeToScalarType<integer_t>::value);
    const auto numbers = c10::CppTypeToScalarType<acc_t>::value;
    reference_ = laid_out(reference, numbers);
    target_ = laid_out(side.target, numbers);
    share_ = laid_out(side.share, numbers);
    if (!weight.defined()) return;
    log_ = laid_out(log, numbers);
    weight_ = laid_out(weight, numbers);
    // P - target - share, with P - 1 = expm1(-log) and target = 1 - label_smoothing.
    of_single_ = at::expm1(log_.neg()).add_(label_smoothing).sub_(share_);
  }

  // From the first row or column of a tile on.
  PairSide<acc_t> from(int64_t first) const {
    PairSide<acc_t> side{};
    side.keys = data<integer_t>(keys_, first);
    side.labels = data<integer_t>(labels_, first);
    side.single = data<integer_t>(single_, first);
    side.reference = data<acc_t>(reference_, first);
    side.target = data<acc_t>(target_, first);
    side.share = data<acc_t>(share_, first);
    side.log = data<acc_t>(log_, first);
    side.weight = data<acc_t>(weight_, first);
    side.of_single = data<acc_t>(of_single_, first);
    return side;
  }

 private:
  bool is_padded_;
  at::Tensor keys_, labels_, single_, reference_, target_, share_, log_, weight_, of_single_;

  at::Tensor laid_out(const at::Tensor& values, at::ScalarType dtype) const {
    if (!values.defined()) return values;
    const auto converted = values.to(dtype);
    return is_padded_ ? pad(converted) : converted.contiguous();
  }
  template <typename scalar_t>
  static const scalar_t* data(const at::Tensor& values, int64_t first) {
    return values.defined() ? values.const_data_ptr<scalar_t>() + first : nullptr;
  }
};

template <typename acc_t>
std::vector<Side<acc_t>> rows_of(c10::ArrayRef<InfoNCE> problems, double label_smoothing) {
  std::vector<Side<acc_t>> sides;
  for (const auto& problem : problems) {
    sides.emplace_back(problem.rows, problem.row_positives, problem.row_nll, problem.row_weight,
                       label_smoothing, /*is_padded=*/false);
  }
  return sides;
}
template <typename acc_t>
std::vector<Side<acc_t>> columns_of(c10::ArrayRef<InfoNCE> problems, double label_smoothing) {
  std::vector<Side<acc_t>> sides;
  for (const auto& problem : problems) {
    sides.emplace_back(problem.columns, problem.column_positives, problem.column_nll,
                       problem.column_weight, label_smoothing, /*is_padded=*/true);
  }
  return sides;
}

bool has_several(const InfoNCESide& side) {
  if (!side.single.defined()) return false;
  return side.single.lt(0).logical_and_(side.target.gt(0)).any().item<bool>();
}

// Whether any row or column has more than one positive.
bool has_several(c10::ArrayRef<InfoNCE> problems) {
  for (const auto& problem : problems) {
    if (has_several(problem.rows) || has_several(problem.columns)) return true;
  }
  return false;
}

// The log of the sum of exp over the pairs that are not excluded; 0 if all are. max and sum do not
// include a single positive, which adds exp(0).
template <typename acc_t>
acc_t log_sum(acc_t max, acc_t sum, bool single) {
  if (!single && sum == 0) return 0;
  const double odds = static_cast<double>(max) + std::log(static_cast<double>(sum));
  if (!single) return static_cast<acc_t>(odds);
  return static_cast<acc_t>(odds > 0 ? odds + std::log1p(std::exp(-odds))
                                     : std::log1p(std::exp(odds)));
}

// What both passes need: the tile of a place without its statistics or gradients.
template <typename acc_t>
struct Tiles {
  c10::ArrayRef<InfoNCE> problems;
  acc_t scale;
  bool has_targets;
  std::vector<Side<acc_t>> rows, columns;

  template <typename factor_t>
  PairTile<acc_t> at(const TilePlace& place, const ProductTile<factor_t>& products) const {
    PairTile<acc_t> tile{};
    tile.products = products.data;
    tile.products_stride = products.stride;
    tile.row = place.row;
    tile.rows = place.rows;
    tile.column = place.column;
    tile.columns = place.columns;
    tile.scale = scale;
    tile.has_labels = problems[place.problem].rows.labels.defined();
    tile.exclude_self = problems[place.problem].exclude_self;
    tile.has_targets = has_targets;
    tile.of_rows = rows[place.problem].from(place.row);
    tile.of_columns = columns[place.problem].from(place.column);
    return tile;
  }
};

template <typename factor_t>
struct PairForm {
  using acc_t = accumulator_t<factor_t>;
  static constexpr acc_t first = -1e30;  // below every logit, and finite
  static constexpr bool formed = false;
  bool columns, totals;
  const Tiles<acc_t>& tiles;

  void update(const TilePlace& place, const ProductTile<factor_t>& products,
              RowStatistics<acc_t>& rows, ColumnStatistics<acc_t> of_columns, acc_t* logits,
              acc_t* column_old_max) const {
    auto tile = tiles.at(place, products);
    tile.of_rows.max = rows.max;
    tile.of_rows.sum = rows.sum;
    tile.of_rows.total = rows.total;
    tile.of_columns.max = of_columns.max;
    tile.of_columns.sum = of_columns.sum;
    tile.of_columns.total = of_columns.total;
    tile.logits = logits;
    tile.column_old_max = column_old_max;
    const auto& loops = pair_loops_of(acc_t{});
    (columns ? loops.statistics : loops.row_statistics)(tile);
  }
  void of_row(int64_t b, int64_t row, acc_t max, acc_t sum, acc_t total) const {
    const auto& problem = tiles.problems[b];
    const bool single = tiles.rows[b].from(row).single[0] >= 0;
    problem.row_nll.template mutable_data_ptr<acc_t>()[row] = log_sum(max, sum, single);
    problem.rows.total.template mutable_data_ptr<acc_t>()[row] = total;
  }
  void of_column(int64_t b, int64_t column, acc_t max, acc_t sum, acc_t total) const {
    const auto& problem = tiles.problems[b];
    const bool single = tiles.columns[b].from(column).single[0] >= 0;
    problem.column_nll.template mutable_data_ptr<acc_t>()[column] = log_sum(max, sum, single);
    problem.columns.total.template mutable_data_ptr<acc_t>()[column] = total;
  }
};

}  // namespace

void info_nce_pairs_statistics(const std::vector<InfoNCE>& problems, double scale,
                               double label_smoothing) {
  Interrupt interrupt(ProductScope::release);
  for_each_group(problems, [&](c10::ArrayRef<InfoNCE> group, auto factor, auto) {
    using factor_t = decltype(factor);
    using acc_t = accumulator_t<factor_t>;
    const auto factors = factors_of<factor_t, acc_t>(group, scale, /*formed=*/false, interrupt);
    const bool totals = label_smoothing != 0 || has_several(group);
    const Tiles<acc_t> tiles{group, static_cast<acc_t>(scale), totals,
                             rows_of<acc_t>(group, label_smoothing),
                             columns_of<acc_t>(group, label_smoothing)};
    const PairForm<factor_t> form{group[0].column_nll.defined(), totals, tiles};
    reduce_tiles(group, factors, form, interrupt);
  });
}

double info_nce_pairs_gradients(const std::vector<InfoNCE>& problems, double scale,
                                double label_smoothing) {
  Interrupt interrupt(ProductScope::release);
  double grad_scale = 0;
  for_each_group(problems, [&](c10::ArrayRef<InfoNCE> group, auto factor, auto rounded) {
    using factor_t = decltype(factor);
    using gradient_t = decltype(rounded);
    using acc_t = accumulator_t<factor_t>;
    const bool formed = group[0].products.defined();
    const auto factors = factors_of<factor_t, gradient_t>(group, scale, formed, interrupt);
    const Tiles<acc_t> tiles{group, static_cast<acc_t>(scale), has_several(group),
                             rows_of<acc_t>(group, label_smoothing),
                             columns_of<acc_t>(group, label_smoothing)};
    const bool both = group[0].column_nll.defined();
    const int64_t samples = group[0].query.size(0);
    std::vector<double> sums(group.size() * at::divup(samples, kRows), 0.0);
    multiply_gradients<factor_t, gradient_t>(
        group, factors, /*halves=*/false, /*add_to_query=*/false, interrupt,
        [&](const TilePlace& place, const ProductTile<factor_t>& products, acc_t* part, acc_t*) {
          auto tile = tiles.at(place, products);
          tile.factor = static_cast<acc_t>(scale);
          tile.part = part;
          const auto& loops = pair_loops_of(acc_t{});
          sums[place.row_block(samples)] += (both ? loops.gradient : loops.row_gradient)(tile);
        });
    grad_scale = std::accumulate(sums.begin(), sums.end(), grad_scale);
  });
  return grad_scale;
}

}  // namespace himo::cpu
