// Forward: row blocks of 64 against column tiles of 256. One pass over a tile updates the softmax
// statistics of both directions. A tile is computed just before that pass; if the logits are cached
// for the backward, all tiles are computed first. Each of up to 64 groups of row blocks has its own
// column statistics (a maximum and a sum per column), which are merged in a fixed order: the result
// has the same bits for any number of threads.
//
// Backward: a tile is recomputed (or read, if cached) and converted to scale dL/dS, which
// logit_gradients.h multiplies by the keys and by the queries.

#include "cpu/info_nce_kernel.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "common/interrupt.h"
#include "cpu/info_nce_factors.h"
#include "cpu/logit_gradients.h"
#include "cpu/tile_loops.h"
#include "cpu/tile_products.h"

namespace himo::cpu {
namespace {

constexpr int64_t kGroups = 64;
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
void statistics(c10::ArrayRef<InfoNCE> problems, double scale, Interrupt& interrupt) {
  using acc_t = accumulator_t<factor_t>;
  const bool cached = problems[0].products.defined();
  const auto factors = factors_of<factor_t, acc_t>(problems, scale, /*formed=*/false, interrupt);
  const int64_t samples = problems[0].query.size(0), keys = problems[0].key.size(0);
  const int64_t offset = problems[0].offset, width = padded(keys);
  // The statistic of a whole batch is -log P; of a block, the log of its part of 1 / P - 1.
  const bool whole = problems[0].positives.defined();
  const auto statistic = [whole](acc_t max, acc_t sum) {
    return whole ? nll(max, sum) : log_odds(max, sum);
  };
  if (whole) {
    for (size_t b = 0; b < problems.size(); ++b) {
      problems[b].positives.copy_(factors[b].column_positives.narrow(0, 0, samples));
    }
  }
  const int64_t row_blocks = at::divup(samples, kRows);
  const int64_t group_blocks = at::divup(row_blocks, kGroups);
  const int64_t groups = at::divup(row_blocks, group_blocks);
  const int64_t count = problems.size();
  const auto options = factors[0].row_positives.options();
  // maximum and sum of each column over the rows of a group: [problems, groups, 2, padded(N)]
  const auto partial = at::zeros({count, groups, 2, width}, options);
  acc_t* partial_data = partial.template mutable_data_ptr<acc_t>();

  at::parallel_for(0, count * groups, 1, [&](int64_t begin, int64_t end) {
    const ProductScope scope;
    const auto scratch = at::empty({2 * kRows * kColumns + kColumns}, options);
    acc_t* logits = scratch.template mutable_data_ptr<acc_t>();
    for (int64_t task = begin; task < end; ++task) {
      const auto& problem = problems[task / groups];
      const auto& own = factors[task / groups];
      const acc_t* row_positives = own.row_positives.template const_data_ptr<acc_t>();
      const acc_t* column_positives = own.column_positives.template const_data_ptr<acc_t>();
      acc_t* column_max = partial_data + task * 2 * width;
      acc_t* row_nll = problem.row_nll.template mutable_data_ptr<acc_t>();
      const int64_t group_end = std::min(samples, (task % groups + 1) * group_blocks * kRows);
      for (int64_t row = task % groups * group_blocks * kRows; row < group_end; row += kRows) {
        const int64_t rows = std::min(kRows, group_end - row);
        acc_t row_max[kRows] = {}, row_sum[kRows] = {};
        for (int64_t column = 0; column < keys; column += kColumns) {
          if (interrupt.poll()) return;
          const int64_t columns = std::min(kColumns, keys - column);
          const ProductTile<factor_t> tile(problem, row, column, logits + kRows * kColumns);
          if (!cached) tile.form(own, row, rows, column, columns);
          loops_of(acc_t{}).statistics({tile.data, tile.stride, logits, rows, columns,
                                        row + offset - column, static_cast<acc_t>(scale),
                                        row_positives + row, column_positives + column, row_max,
                                        row_sum, column_max + column, column_max + width + column,
                                        logits + 2 * kRows * kColumns});
        }
        for (int64_t i = 0; i < rows; ++i) row_nll[row + i] = statistic(row_max[i], row_sum[i]);
      }
    }
  });

  at::parallel_for(0, count * keys, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t column = task % keys;
      const acc_t* first = partial_data + task / keys * groups * 2 * width + column;
      acc_t max = 0, sum = 0;
      for (int64_t g = 0; g < groups; ++g) max = std::max(max, first[g * 2 * width]);
      for (int64_t g = 0; g < groups; ++g) {
        sum += first[(g * 2 + 1) * width] * std::exp(first[g * 2 * width] - max);
      }
      problems[task / keys].column_nll.template mutable_data_ptr<acc_t>()[column] =
          statistic(max, sum);
    }
  });
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
  multiply_gradients<factor_t, gradient_t>(
      problems, factors, /*halves=*/!options.differentiate_keys, options.add_to_query, interrupt,
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
             data(column_weight[place.problem], place.column), row_part, column_part});
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

void info_nce_statistics(const std::vector<InfoNCE>& problems, double scale) {
  Interrupt interrupt(ProductScope::release);
  for_each_group(problems, [&](c10::ArrayRef<InfoNCE> group, auto factor, auto) {
    statistics<decltype(factor)>(with_small_products(group), scale, interrupt);
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
