// The two passes over the tiles of the logits, for the square form of InfoNCE and for any pairs. A
// form gives the loops over one tile.
//
// Forward: row blocks of 64 against column tiles of 256. One pass over a tile updates the softmax
// statistics of both directions. A tile is computed just before that pass; if the logits are cached
// for the backward, all tiles are computed first. Each of up to 64 groups of row blocks has its own
// column statistics, which are merged in a fixed order: the result has the same bits for any number
// of threads.
//
// Backward: a tile is recomputed (or read, if cached) and converted to scale dL/dS. Each row block
// multiplies its dL/dS by the keys into grad_query and writes its transpose into a workspace. The
// workspace holds a chunk of rows: kWorkspace bytes or two row blocks per thread, whichever is
// larger; all rows when several small problems share the threads. When a chunk is complete, each
// column block multiplies it by the queries and accumulates into grad_key. No two threads write to
// the same memory.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "common/interrupt.h"
#include "cpu/info_nce_factors.h"
#include "cpu/tile_loops.h"
#include "cpu/tile_products.h"

namespace himo::cpu {

constexpr int64_t kGroups = 64;
constexpr int64_t kWorkspace = 16 << 20;
// With at least this many samples, bfloat16 features get their gradients from dL/dS rounded to
// bfloat16, as under autocast, which takes half the time. With fewer, these products take little of
// the time, and the sums are too short to average out the rounding.
constexpr int64_t kRoundedSamples = 256;
// Small problems run in groups that share the threads. A group has at most this many rows.
constexpr int64_t kRowsAtATime = 4096;

inline const auto& loops_of(float) { return tile_loops().float32; }
inline const auto& loops_of(double) { return tile_loops().float64; }

// A tile of the logits of problem b of a call.
template <typename acc_t>
struct Place {
  int64_t b;
  acc_t* products;
  int64_t stride;  // of products
  int64_t row, rows, column, columns;
};

// Softmax statistics: the maximum, a sum of exp relative to it, and a sum of another kind.
template <typename acc_t>
struct RowStatistics {
  acc_t max[kRows], sum[kRows] = {}, total[kRows] = {};
};
template <typename acc_t>
struct ColumnStatistics {
  acc_t *max, *sum, *total;  // [padded(N)] each; those of a tile start at its first column
  ColumnStatistics at(int64_t column) const { return {max + column, sum + column, total + column}; }
};

// Form has: `first`, the maximum of nothing; `columns`, whether columns have statistics, and
// `totals`, whether totals; update(place, rows, columns, logits, column_old_max), with scratch
// [kRows, kColumns] and [kColumns], which updates the statistics by a tile; and of_row(b, row, max,
// sum, total) and of_column likewise, which take the final ones.
template <typename factor_t, typename Form>
void reduce_tiles(c10::ArrayRef<InfoNCE> problems,
                  const std::vector<Factors<factor_t, accumulator_t<factor_t>>>& factors,
                  const Form& form, Interrupt& interrupt) {
  using acc_t = accumulator_t<factor_t>;
  const bool cached = problems[0].products.defined();
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
          if (!cached) tile.form(factors[b], row, rows, column, columns);
          form.update({b, tile.data, tile.stride, row, rows, column, columns}, of_rows,
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

// Returns the gradient of a tile as the left factor of the product with the keys.
template <typename acc_t>
const acc_t* as_factor(const acc_t* tile, int64_t, int64_t, acc_t*) {
  return tile;
}
inline const c10::BFloat16* as_factor(const float* tile, int64_t rows, int64_t width,
                                      c10::BFloat16* rounded) {
  tile_loops().round_bfloat16(tile, width, rows, width, reinterpret_cast<uint16_t*>(rounded),
                              width);
  return rounded;
}

// Writes the transposed gradient of a tile into the left factor of the product with the queries.
template <typename acc_t>
void transpose(const acc_t* tile, int64_t width, int64_t rows, int64_t columns, acc_t* out,
               int64_t stride) {
  loops_of(acc_t{}).transpose(tile, width, rows, columns, out, stride);
}
inline void transpose(const float* tile, int64_t width, int64_t rows, int64_t columns,
                      c10::BFloat16* out, int64_t stride) {
  tile_loops().transpose_bfloat16(tile, width, rows, columns, reinterpret_cast<uint16_t*>(out),
                                  stride);
  if (rows % 2 == 0) return;  // rows are multiplied in pairs: pad an odd last row with 0
  for (int64_t j = 0; j < columns; ++j) out[j * stride + rows] = 0;
}

// Rows of a chunk of the workspace.
template <typename gradient_t>
int64_t workspace_rows(c10::ArrayRef<InfoNCE> problems) {
  const int64_t samples = problems[0].query.size(0), keys = problems[0].key.size(0);
  const int64_t row_bytes = keys * static_cast<int64_t>(sizeof(gradient_t));
  const int64_t least = 2 * kRows * at::get_num_threads();  // two row blocks per thread
  const int64_t most = at::divup(samples, kRows) * kRows;
  if (problems.size() > 1) return most;
  return std::min(most, std::max(least, kWorkspace / row_bytes / kRows * kRows));
}

// Multiplies a chunk of factor dL/dS, transposed [problems, N, chunk], by its queries; the result
// is added to grad_key, or written there for the first chunk.
template <typename factor_t, typename gradient_t>
void multiply_queries(c10::ArrayRef<InfoNCE> problems,
                      const std::vector<Factors<factor_t, gradient_t>>& factors,
                      const gradient_t* transposed, int64_t chunk, int64_t chunk_row,
                      int64_t chunk_rows, Interrupt& interrupt) {
  const int64_t keys = problems[0].key.size(0), key_blocks = at::divup(keys, kRows);
  const int64_t count = problems.size(), inner = problems[0].query.size(1);
  at::parallel_for(0, count * key_blocks, 1, [&](int64_t begin, int64_t end) {
    const ProductScope scope;
    for (int64_t task = begin; task < end; ++task) {
      if (interrupt.poll()) return;
      const int64_t b = task / key_blocks, key = task % key_blocks * kRows;
      auto* grad_key =
          problems[b].grad_key.template mutable_data_ptr<accumulator_t<factor_t>>() + key * inner;
      factors[b].queries.multiply(transposed + (b * keys + key) * chunk, chunk,
                                  std::min(kRows, keys - key), chunk_row, chunk_rows, 0, inner,
                                  /*add=*/chunk_row > 0, grad_key, inner);
    }
  });
}

// gradient(place, row_part, column_part) writes factor dL/dS of a tile and returns its part of the
// gradient of scale. column_part is null if row_part receives the gradient of both directions.
template <typename factor_t, typename gradient_t, typename Gradient>
double multiply_gradients(c10::ArrayRef<InfoNCE> problems,
                          const std::vector<Factors<factor_t, gradient_t>>& factors,
                          bool differentiate_keys, bool add_to_query, const Gradient& gradient,
                          Interrupt& interrupt) {
  using acc_t = accumulator_t<factor_t>;
  const bool cached = problems[0].products.defined();
  const int64_t samples = problems[0].query.size(0), keys = problems[0].key.size(0);
  const int64_t count = problems.size();
  const bool needs_query = problems[0].grad_query.defined();
  const bool needs_key = problems[0].grad_key.defined();

  const int64_t chunk = workspace_rows<gradient_t>(problems);
  const auto options_of_acc = factors[0].row_positives.options();
  const auto options_of_factor = options_of_acc.dtype(c10::CppTypeToScalarType<gradient_t>::value);
  // factor dL/dS of a chunk of rows, transposed: [problems, N, chunk]
  const auto workspace = at::empty({needs_key ? count * keys * chunk : 0}, options_of_factor);
  gradient_t* const transposed = workspace.template mutable_data_ptr<gradient_t>();
  const int64_t row_blocks = at::divup(samples, kRows);
  std::vector<double> grad_scale(count * row_blocks, 0.0);

  for (int64_t chunk_row = 0; chunk_row < samples; chunk_row += chunk) {
    const int64_t chunk_rows = std::min(chunk, samples - chunk_row);
    const int64_t chunk_blocks = at::divup(chunk_rows, kRows);
    at::parallel_for(0, count * chunk_blocks, 1, [&](int64_t begin, int64_t end) {
      const ProductScope scope;
      const auto scratch = at::empty({3 * kRows * kColumns}, options_of_acc);
      const auto rounded = at::empty({kRows * kColumns}, options_of_factor);
      acc_t* const products = scratch.template mutable_data_ptr<acc_t>();
      acc_t* const row_part = products + kRows * kColumns;
      acc_t* const column_part = differentiate_keys ? nullptr : row_part + kRows * kColumns;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b = task / chunk_blocks;
        const int64_t row = chunk_row + task % chunk_blocks * kRows;
        const int64_t rows = std::min(kRows, samples - row);
        const auto& problem = problems[b];
        const int64_t inner = problem.query.size(1);
        double sum = 0;
        for (int64_t column = 0; column < keys; column += kColumns) {
          if (interrupt.poll()) return;
          const int64_t columns = std::min(kColumns, keys - column), width = padded(columns);
          const ProductTile<factor_t> tile(problem, row, column, products);
          if (!cached) tile.form(factors[b], row, rows, column, columns);
          sum += gradient({b, tile.data, tile.stride, row, rows, column, columns}, row_part,
                          column_part);
          if (needs_query) {
            factors[b].keys.multiply(
                as_factor(row_part, rows, width, rounded.template mutable_data_ptr<gradient_t>()),
                width, rows, column, columns, 0, inner, /*add=*/column > 0 || add_to_query,
                problem.grad_query.template mutable_data_ptr<acc_t>() + row * inner, inner);
          }
          if (needs_key) {
            transpose(column_part == nullptr ? row_part : column_part, width, rows, columns,
                      transposed + (b * keys + column) * chunk + (row - chunk_row), chunk);
          }
        }
        grad_scale[b * row_blocks + row / kRows] = sum;
      }
    });
    if (needs_key) {
      multiply_queries(problems, factors, transposed, chunk, chunk_row, chunk_rows, interrupt);
    }
  }
  return std::accumulate(grad_scale.begin(), grad_scale.end(), 0.0);
}

// Calls run(group, factor_t{}, gradient_t{}) for each group of problems that share the threads.
template <typename Run>
void for_each_group(const std::vector<InfoNCE>& problems, const Run& run) {
  if (problems.empty()) return;
  const int64_t samples = std::max(problems[0].query.size(0), problems[0].key.size(0));
  const auto dtype = problems[0].query.scalar_type();
  const size_t size = std::max<int64_t>(1, kRowsAtATime / samples);
  for (size_t first = 0; first < problems.size(); first += size) {
    const c10::ArrayRef<InfoNCE> group(problems.data() + first,
                                       std::min(size, problems.size() - first));
    if (dtype == at::kDouble) {
      run(group, double{}, double{});
    } else if (dtype != at::kBFloat16 || !multiplies_bfloat16()) {
      run(group, float{}, float{});
    } else if (samples < kRoundedSamples) {
      run(group, c10::BFloat16{}, float{});
    } else {
      run(group, c10::BFloat16{}, c10::BFloat16{});
    }
  }
}

}  // namespace himo::cpu
