// Forward: row blocks of 64 against column tiles of 256. One pass over a tile updates the softmax
// statistics of both directions. A tile is computed just before that pass; if the logits are cached
// for the backward, all tiles are computed first. Each of up to 64 groups of row blocks has its own
// column statistics (a maximum and a sum per column), which are merged in a fixed order: the result
// has the same bits for any number of threads.
//
// Backward: a tile is recomputed (or read, if cached) and converted to scale dL/dS. Each row block
// multiplies its dL/dS by the keys into grad_query and writes its transpose into a workspace. The
// workspace holds a chunk of rows: kWorkspace bytes or two row blocks per thread, whichever is
// larger; all rows when several small problems share the threads. When a chunk is complete, each
// column block multiplies it by the queries and accumulates into grad_key. No two threads write to
// the same memory.

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
#include "cpu/tile_loops.h"
#include "cpu/tile_products.h"

namespace himo::cpu {
namespace {

constexpr int64_t kGroups = 64;
constexpr int64_t kWorkspace = 16 << 20;
// With at least this many samples, bfloat16 features get their gradients from dL/dS rounded to
// bfloat16, as under autocast, which takes half the time. With fewer, these products take little of
// the time, and the sums are too short to average out the rounding.
constexpr int64_t kRoundedSamples = 256;
// Products of at most this size are computed first in any case: the positives are their diagonal,
// and computing them alone takes a quarter of the time of 128 samples.
constexpr size_t kSmallProducts = 1 << 20;
// Small problems run in groups that share the threads. A group has at most this many rows.
constexpr int64_t kRowsAtATime = 4096;

const auto& loops_of(float) { return tile_loops().float32; }
const auto& loops_of(double) { return tile_loops().float64; }

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

// Returns the gradient of a tile as the left factor of the product with the keys.
template <typename acc_t>
const acc_t* as_factor(const acc_t* tile, int64_t, int64_t, acc_t*) {
  return tile;
}
const c10::BFloat16* as_factor(const float* tile, int64_t rows, int64_t width,
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
void transpose(const float* tile, int64_t width, int64_t rows, int64_t columns, c10::BFloat16* out,
               int64_t stride) {
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

template <typename factor_t, typename gradient_t>
double gradients(c10::ArrayRef<InfoNCE> problems, bool formed, const InfoNCEOptions& options,
                 Interrupt& interrupt) {
  using acc_t = accumulator_t<factor_t>;
  const bool cached = problems[0].products.defined();
  const auto factors = factors_of<factor_t, gradient_t>(problems, options.scale, formed, interrupt);
  const int64_t samples = problems[0].query.size(0), keys = problems[0].key.size(0);
  const int64_t count = problems.size(), offset = problems[0].offset;
  const bool needs_query = problems[0].grad_query.defined();
  const bool needs_key = problems[0].grad_key.defined();
  const auto scale = static_cast<acc_t>(options.scale);
  const auto factor = static_cast<acc_t>(options.factor);
  const auto smoothing = static_cast<acc_t>(options.label_smoothing);

  const int64_t chunk = workspace_rows<gradient_t>(problems);
  const auto options_of_acc = factors[0].row_positives.options();
  const auto options_of_factor = options_of_acc.dtype(c10::CppTypeToScalarType<gradient_t>::value);
  // factor dL/dS of a chunk of rows, transposed: [problems, N, chunk]
  const auto workspace = at::empty({needs_key ? count * keys * chunk : 0}, options_of_factor);
  gradient_t* const transposed = workspace.template mutable_data_ptr<gradient_t>();
  std::vector<at::Tensor> column_nll, column_weight;
  for (const auto& problem : problems) {
    column_nll.push_back(pad(problem.column_nll));
    column_weight.push_back(pad(problem.column_weight));
  }
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
      acc_t* const column_part = options.differentiate_keys ? nullptr : row_part + kRows * kColumns;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b = task / chunk_blocks;
        const int64_t row = chunk_row + task % chunk_blocks * kRows;
        const int64_t rows = std::min(kRows, samples - row);
        const auto& problem = problems[b];
        const int64_t inner = problem.query.size(1);
        const acc_t* row_positives = factors[b].row_positives.template const_data_ptr<acc_t>();
        const acc_t* column_positives =
            factors[b].column_positives.template const_data_ptr<acc_t>();
        double sum = 0;
        for (int64_t column = 0; column < keys; column += kColumns) {
          if (interrupt.poll()) return;
          const int64_t columns = std::min(kColumns, keys - column), width = padded(columns);
          const ProductTile<factor_t> tile(problem, row, column, products);
          if (!cached) tile.form(factors[b], row, rows, column, columns);
          sum += loops_of(acc_t{}).gradient(
              {tile.data, tile.stride, rows, columns, row + offset - column, scale, factor,
               smoothing, smoothing / static_cast<acc_t>(options.total), row_positives + row,
               problem.row_nll.template const_data_ptr<acc_t>() + row,
               problem.row_weight.template const_data_ptr<acc_t>() + row, column_positives + column,
               column_nll[b].template const_data_ptr<acc_t>() + column,
               column_weight[b].template const_data_ptr<acc_t>() + column, row_part, column_part});
          if (needs_query) {
            factors[b].keys.multiply(
                as_factor(row_part, rows, width, rounded.template mutable_data_ptr<gradient_t>()),
                width, rows, column, columns, 0, inner, /*add=*/column > 0 || options.add_to_query,
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
