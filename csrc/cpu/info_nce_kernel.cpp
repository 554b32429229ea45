// The square form and its blocks: row i and column i + offset are the only positive pairs. The
// passes are in logit_statistics.h and logit_gradients.h.

#include "cpu/info_nce_kernel.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "common/interrupt.h"
#include "cpu/centring.h"
#include "cpu/info_nce_factors.h"
#include "cpu/logit_gradients.h"
#include "cpu/logit_statistics.h"
#include "cpu/tile_loops.h"

namespace himo::cpu {
namespace {

// Products of at most this size are computed first in any case: the positives are their diagonal,
// and computing them alone takes a quarter of the time of 128 samples.
constexpr size_t kSmallProducts = 1 << 20;

// -log P of a positive p: log(1 + exp(max) sum), where exp(max) sum is the sum of exp(S - p) over
// the negatives.
template <typename acc_t>
acc_t nll(acc_t max, acc_t sum) {
  const double m = max, s = sum;
  if (m == 0) return static_cast<acc_t>(std::log1p(s));
  return static_cast<acc_t>(m + std::log(s + std::exp(-m)));
}

// The log of the same sum: max + log(sum).
template <typename acc_t>
acc_t log_odds(acc_t max, acc_t sum) {
  return static_cast<acc_t>(static_cast<double>(max) + std::log(static_cast<double>(sum)));
}

template <typename factor_t>
struct SquareForm {
  using acc_t = accumulator_t<factor_t>;
  static constexpr acc_t first = 0;
  static constexpr bool columns = true, totals = false;
  c10::ArrayRef<InfoNCE> problems;
  const std::vector<Factors<factor_t, acc_t>>& factors;
  acc_t scale;
  bool whole;  // the statistic of a whole batch is -log P; of a block, the log of its 1 / P - 1
  bool formed;

  acc_t statistic(acc_t max, acc_t sum) const { return whole ? nll(max, sum) : log_odds(max, sum); }

  void update(const TilePlace& at, const ProductTile<factor_t>& tile, RowStatistics<acc_t>& rows,
              ColumnStatistics<acc_t> columns, acc_t* logits, acc_t* column_old_max) const {
    const auto& own = factors[at.problem];
    loops_of(acc_t{}).statistics({tile.data, tile.stride, logits, at.rows, at.columns,
                                  at.row + problems[at.problem].offset - at.column, scale,
                                  own.row_positives.template const_data_ptr<acc_t>() + at.row,
                                  own.column_positives.template const_data_ptr<acc_t>() + at.column,
                                  rows.max, rows.sum, columns.max, columns.sum, column_old_max});
  }
  void of_row(int64_t b, int64_t row, acc_t max, acc_t sum, acc_t) const {
    problems[b].row_nll.template mutable_data_ptr<acc_t>()[row] = statistic(max, sum);
  }
  void of_column(int64_t b, int64_t column, acc_t max, acc_t sum, acc_t) const {
    problems[b].column_nll.template mutable_data_ptr<acc_t>()[column] = statistic(max, sum);
  }
};

template <typename factor_t>
void statistics(c10::ArrayRef<InfoNCE> problems, double scale, bool formed, Interrupt& interrupt) {
  using acc_t = accumulator_t<factor_t>;
  const auto factors = factors_of<factor_t, acc_t>(problems, scale, formed, interrupt);
  const bool whole = problems[0].positives.defined();
  if (whole) {
    for (size_t b = 0; b < problems.size(); ++b) {
      std::copy_n(factors[b].column_positives.template const_data_ptr<acc_t>(),
                  problems[b].query.size(0),
                  problems[b].positives.template mutable_data_ptr<acc_t>());
    }
  }
  const SquareForm<factor_t> form{problems, factors, static_cast<acc_t>(scale), whole,
                                  problems[0].products.defined()};
  reduce_tiles(problems, factors, form, interrupt);
}

// row += values. Returns the sum of the row before. Eight sums, so that the loop is vectorised.
template <typename acc_t>
HIMO_WIDE double add_row(const acc_t* values, int64_t size, acc_t* row) {
  double sums[8] = {};
  int64_t k = 0;
  for (; k + 8 <= size; k += 8) {
    for (int64_t u = 0; u < 8; ++u) {
      sums[u] += row[k + u];
      row[k + u] += values[k + u];
    }
  }
  for (; k < size; ++k) {
    sums[0] += row[k];
    row[k] += values[k];
  }
  return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
}

// tile += values, both at this place of [N, N]. Adds the sums of the tile's rows before to `sums`,
// unless it is null.
template <typename acc_t>
void add_tile(const at::Tensor& values, const TilePlace& place, acc_t* tile, double* sums) {
  const int64_t stride = values.size(1), width = padded(place.columns);
  const acc_t* from = values.template const_data_ptr<acc_t>() + place.row * stride + place.column;
  for (int64_t i = 0; i < place.rows; ++i) {
    const double sum = add_row(from + i * stride, place.columns, tile + i * width);
    if (sums != nullptr) sums[i] += sum;
  }
}

// Adds the gradient by another loss to a tile. `same`: column_part is not yet written, and this
// loss has the same gradient for query and key.
template <typename acc_t>
void add_other(const InfoNCE& problem, const TilePlace& place, bool same, acc_t* row_part,
               acc_t* column_part) {
  if (column_part != nullptr) {
    if (same) std::copy_n(row_part, place.rows * padded(place.columns), column_part);
    const auto& for_key = problem.for_key.defined() ? problem.for_key : problem.for_query;
    add_tile(for_key, place, column_part, nullptr);
  }
  add_tile(problem.for_query, place, row_part,
           problem.row_sums.mutable_data_ptr<double>() + place.row);
}

template <typename factor_t, typename gradient_t>
double gradients(c10::ArrayRef<InfoNCE> problems, bool formed, const InfoNCEOptions& options,
                 Interrupt& interrupt) {
  using acc_t = accumulator_t<factor_t>;
  const auto factors = factors_of<factor_t, gradient_t>(problems, options.scale, formed, interrupt);
  const int64_t samples = problems[0].query.size(0), offset = problems[0].offset;
  const auto scale = static_cast<acc_t>(options.scale);
  const auto factor = static_cast<acc_t>(options.factor);
  const auto smoothing = static_cast<acc_t>(options.label_smoothing);
  const auto share = smoothing / static_cast<acc_t>(options.total);
  std::vector<at::Tensor> column_nll, column_weight;
  for (const auto& problem : problems) {
    column_nll.push_back(pad(problem.column_nll));
    column_weight.push_back(pad(problem.column_weight));
  }
  std::vector<double> grad_scale(problems.size() * at::divup(samples, kRows), 0.0);
  // Of this loss, and of another.
  const bool same = options.differentiate_keys, other = problems[0].for_query.defined();
  multiply_gradients<factor_t, gradient_t>(
      problems, factors, /*halves=*/!same || problems[0].for_key.defined(), options.add_to_query,
      interrupt,
      [&](const TilePlace& place, const ProductTile<factor_t>& tile, acc_t* row_part,
          acc_t* column_part) {
        const auto& problem = problems[place.problem];
        const auto data = [](const at::Tensor& values, int64_t first) {
          return values.template const_data_ptr<acc_t>() + first;
        };
        grad_scale[place.row_block(samples)] += loops_of(acc_t{}).gradient(
            {tile.data, tile.stride, place.rows, place.columns, place.row + offset - place.column,
             scale, factor, smoothing, share, data(factors[place.problem].row_positives, place.row),
             data(problem.row_nll, place.row), data(problem.row_weight, place.row),
             data(factors[place.problem].column_positives, place.column),
             data(column_nll[place.problem], place.column),
             data(column_weight[place.problem], place.column), row_part,
             same ? nullptr : column_part});
        if (other) add_other(problem, place, same, row_part, column_part);
      });
  return std::accumulate(grad_scale.begin(), grad_scale.end(), 0.0);
}

// Gives whole batches memory for their products if that is small.
std::vector<InfoNCE> with_small_products(c10::ArrayRef<InfoNCE> problems) {
  auto result = problems.vec();
  for (auto& problem : result) {
    if (problem.products.defined() || problem.row_positives.defined()) continue;
    const int64_t samples = problem.query.size(0);
    const auto options = problem.row_nll.options();
    if (samples * samples * options.dtype().itemsize() > kSmallProducts) continue;
    problem.products = at::empty({samples, samples}, options);
  }
  return result;
}

}  // namespace

void info_nce_statistics(const std::vector<InfoNCE>& problems, double scale, bool formed) {
  Interrupt interrupt(ProductScope::release);
  for_each_group(problems, [&](c10::ArrayRef<InfoNCE> group, auto factor, auto) {
    statistics<decltype(factor)>(with_small_products(group), scale, formed, interrupt);
  });
}

void info_nce_products(const std::vector<InfoNCE>& problems) {
  Interrupt interrupt(ProductScope::release);
  for_each_group(problems, [&](c10::ArrayRef<InfoNCE> group, auto factor, auto) {
    using factor_t = decltype(factor);
    std::vector<ProductFactors<factor_t, accumulator_t<factor_t>>> factors;
    for (const auto& problem : group) factors.emplace_back(problem, /*with_logits=*/true);
    form_products(group, factors, interrupt);
  });
}

double info_nce_gradients(const std::vector<InfoNCE>& problems, const InfoNCEOptions& options) {
  Interrupt interrupt(ProductScope::release);
  double grad_scale = 0;
  for_each_group(problems, [&](c10::ArrayRef<InfoNCE> group, auto factor, auto gradient) {
    const bool formed = group[0].products.defined();
    grad_scale += gradients<decltype(factor), decltype(gradient)>(with_small_products(group),
                                                                  formed, options, interrupt);
  });
  return grad_scale;
}

}  // namespace himo::cpu
