// From tiles of query key^T to the softmax statistics of rows and columns, for the square form of
// InfoNCE and for any pairs. A form gives the loop over one tile.
//
// Row blocks of 64 run against column tiles of 256. One pass over a tile updates the statistics of
// both directions. A tile is computed just before that pass, unless the form says that all tiles
// are already in the cache of logits for the backward. Each of up to 64 groups of row blocks has
// its own column statistics, which are merged in a fixed order: the result has the same bits for
// any number of threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/interrupt.h"
#include "cpu/info_nce_factors.h"
#include "cpu/logit_products.h"

namespace himo::cpu {

constexpr int64_t kGroups = 64;

// Softmax statistics: the maximum, a sum of exp relative to it, and a sum of another kind.
template <typename acc_t>
struct RowStatistics {
  acc_t max[kRows], sum[kRows] = {}, total[kRows] = {};
};
template <typename acc_t>
struct ColumnStatistics {
  acc_t *max, *sum, *total;  // [padded(N)] each; a tile's part starts at its first column
  ColumnStatistics at(int64_t column) const { return {max + column, sum + column, total + column}; }
};

// Form has: `first`, the maximum of nothing; `columns`, whether columns have statistics, `totals`,
// whether totals, and `formed`, whether the cached products are already computed; update(place,
// tile, rows, columns, logits, column_old_max), with scratch [kRows, kColumns] and [kColumns],
// which updates the statistics by a tile; and of_row(b, row, max, sum, total) and of_column
// likewise, which take the final ones.
template <typename factor_t, typename Form>
void reduce_tiles(c10::ArrayRef<InfoNCE> problems,
                  const std::vector<Factors<factor_t, accumulator_t<factor_t>>>& factors,
                  const Form& form, Interrupt& interrupt) {
  using acc_t = accumulator_t<factor_t>;
  const int64_t samples = problems[0].query.size(0), keys = problems[0].key.size(0);
  const int64_t kinds = form.totals ? 3 : 2, width = form.columns ? padded(keys) : 0;
  const int64_t row_blocks = at::divup(samples, kRows);
  const int64_t group_blocks = at::divup(row_blocks, kGroups);
  const int64_t groups = at::divup(row_blocks, group_blocks);
  const int64_t count = problems.size();
  const auto options = factors[0].row_positives.options();
  // The statistics of each column over the rows of a group: [problems, groups, kinds, padded(N)].
  const auto partial = at::zeros({count * groups, kinds, width}, options);
  if (form.first != 0) partial.select(1, 0).fill_(form.first);
  acc_t* partial_data = partial.template mutable_data_ptr<acc_t>();
  const auto of_task = [&](int64_t task) -> ColumnStatistics<acc_t> {
    acc_t* max = partial_data + task * kinds * width;
    return {max, max + width, max + (kinds - 1) * width};
  };

  at::parallel_for(0, count * groups, 1, [&](int64_t begin, int64_t end) {
    const ProductScope scope;
    const auto scratch = at::empty({2 * kRows * kColumns + kColumns}, options);
    acc_t* logits = scratch.template mutable_data_ptr<acc_t>();
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / groups;
      const auto of_columns = of_task(task);
      const int64_t group_end = std::min(samples, (task % groups + 1) * group_blocks * kRows);
      for (int64_t row = task % groups * group_blocks * kRows; row < group_end; row += kRows) {
        const int64_t rows = std::min(kRows, group_end - row);
        RowStatistics<acc_t> of_rows;
        std::fill_n(of_rows.max, kRows, form.first);
        for (int64_t column = 0; column < keys; column += kColumns) {
          if (interrupt.poll()) return;
          const int64_t columns = std::min(kColumns, keys - column);
          const ProductTile<factor_t> tile(problems[b], row, column, logits + kRows * kColumns);
          if (!form.formed) tile.form(factors[b], row, rows, column, columns);
          form.update(TilePlace{b, row, rows, column, columns}, tile, of_rows,
                      of_columns.at(form.columns ? column : 0), logits,
                      logits + 2 * kRows * kColumns);
        }
        for (int64_t i = 0; i < rows; ++i) {
          form.of_row(b, row + i, of_rows.max[i], of_rows.sum[i], of_rows.total[i]);
        }
      }
    }
  });
  if (!form.columns) return;

  at::parallel_for(0, count * keys, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / keys, column = task % keys;
      const acc_t* first = of_task(b * groups).max + column;
      acc_t max = form.first, sum = 0, total = 0;
      for (int64_t g = 0; g < groups; ++g) max = std::max(max, first[g * kinds * width]);
      for (int64_t g = 0; g < groups; ++g) {
        const acc_t* own = first + g * kinds * width;
        sum += own[width] * std::exp(own[0] - max);
        if (form.totals) total += own[2 * width];
      }
      form.of_column(b, column, max, sum, total);
    }
  });
}

}  // namespace himo::cpu
