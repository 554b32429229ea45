// From tiles of query key^T to the gradients of query and key.
//
// A tile is formed (or read, if cached) and its loss converts it to a factor times dL/dS. Each row
// block multiplies that by the keys into grad_query and writes its transpose into a workspace. The
// workspace holds a chunk of rows: kChunkRows, fewer if they take more than kWorkspace bytes, or
// two row blocks per thread if that is more; all rows when several small problems share the
// threads. When a chunk is complete, its queries are laid out, and each column block multiplies it
// by them and accumulates into grad_key. No two threads write to the same memory.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <vector>

#include "common/interrupt.h"
#include "cpu/logit_products.h"

namespace himo::cpu {

// With longer chunks the sums over rows are no faster, and the workspace leaves the caches.
constexpr int64_t kChunkRows = 512;
constexpr int64_t kWorkspace = 16 << 20;
// With at least this many samples, bfloat16 features get their gradients from dL/dS rounded to
// bfloat16, as under autocast, which takes half the time. With fewer, these products take little of
// the time, and the sums are too short to average out the rounding.
constexpr int64_t kRoundedSamples = 256;
// Small problems run in groups that share the threads. A group has at most this many rows.
constexpr int64_t kRowsAtATime = 4096;

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
template <typename gradient_t, typename Problem>
int64_t workspace_rows(c10::ArrayRef<Problem> problems) {
  const int64_t samples = problems[0].query.size(0), keys = problems[0].key.size(0);
  const int64_t row_bytes = keys * static_cast<int64_t>(sizeof(gradient_t));
  const int64_t least = 2 * kRows * at::get_num_threads();  // two row blocks per thread
  const int64_t most = at::divup(samples, kRows) * kRows;
  if (problems.size() > 1) return most;
  const int64_t fitting = std::min(kChunkRows, kWorkspace / row_bytes / kRows * kRows);
  return std::min(most, std::max(least, fitting));
}

// Where the rows of a gradient are summed: in the gradient, or in other memory if the gradient is
// bfloat16, which finish() writes. The gradient may be undefined.
template <typename acc_t>
class RowSums {
 public:
  RowSums(const at::Tensor& gradient, acc_t* memory, int64_t row)
      : gradient_(gradient), row_(row), rounds_(is_rounded(gradient)) {
    if (rounds_) data_ = memory;
    if (rounds_ || !gradient.defined()) return;
    data_ = gradient.template mutable_data_ptr<acc_t>() + row * gradient.size(1);
  }

  static bool is_rounded(const at::Tensor& gradient) {
    return gradient.defined() && gradient.scalar_type() == at::kBFloat16;
  }
  acc_t* data() const { return data_; }
  void finish(int64_t rows) const {
    if constexpr (std::is_same_v<acc_t, float>) {
      if (!rounds_) return;
      const int64_t width = gradient_.size(1);
      auto* out = gradient_.template mutable_data_ptr<c10::BFloat16>() + row_ * width;
      tile_loops().round_bfloat16(data_, width, rows, width, reinterpret_cast<uint16_t*>(out),
                                  width);
    }
  }

 private:
  const at::Tensor& gradient_;
  int64_t row_;
  bool rounds_;
  acc_t* data_ = nullptr;
};

// Multiplies a chunk of factor dL/dS, transposed [problems, N, chunk], by its queries; the result
// is added to grad_key, or written there for the first chunk. sums [problems, N, K] is used if
// grad_key is bfloat16.
template <typename factor_t, typename gradient_t, typename Problem>
void multiply_queries(c10::ArrayRef<Problem> problems, const gradient_t* transposed, int64_t chunk,
                      int64_t chunk_row, int64_t chunk_rows, accumulator_t<factor_t>* sums,
                      Interrupt& interrupt) {
  const int64_t keys = problems[0].key.size(0), key_blocks = at::divup(keys, kRows);
  const int64_t count = problems.size(), inner = problems[0].query.size(1);
  std::vector<RightFactor<gradient_t>> queries;
  for (const auto& problem : problems) {
    queries.emplace_back(problem.query.narrow(0, chunk_row, chunk_rows));
  }
  const bool is_last = chunk_row + chunk_rows == problems[0].query.size(0);
  at::parallel_for(0, count * key_blocks, 1, [&](int64_t begin, int64_t end) {
    const ProductScope scope;
    for (int64_t task = begin; task < end; ++task) {
      if (interrupt.poll()) return;
      const int64_t b = task / key_blocks, key = task % key_blocks * kRows;
      const int64_t rows = std::min(kRows, keys - key);
      const RowSums<accumulator_t<factor_t>> grad_key(problems[b].grad_key,
                                                      sums + (b * keys + key) * inner, key);
      queries[b].multiply(transposed + (b * keys + key) * chunk, chunk, rows, 0, chunk_rows, 0,
                          inner, /*add=*/chunk_row > 0, grad_key.data(), inner);
      if (is_last) grad_key.finish(rows);
    }
  });
}

// Calls gradient(place, tile, row_part, column_part) for every tile, and multiplies what it writes
// into the gradients that are defined. gradient writes factor dL/dS [rows, padded(columns)],
// zero-padded: its row part, and its column part, which is null unless halves is set; without
// halves, row_part receives the sum of both. The tiles of a row block come one after the other.
// With add_to_query, which needs a grad_query of acc_t, its values are added to.
template <typename factor_t, typename gradient_t, typename Problem, typename Factors,
          typename Gradient>
void multiply_gradients(c10::ArrayRef<Problem> problems, const std::vector<Factors>& factors,
                        bool halves, bool add_to_query, Interrupt& interrupt,
                        const Gradient& gradient) {
  using acc_t = accumulator_t<factor_t>;
  const bool cached = problems[0].products.defined();
  const int64_t samples = problems[0].query.size(0), keys = problems[0].key.size(0);
  const int64_t count = problems.size(), inner = problems[0].query.size(1);
  const bool needs_query = problems[0].grad_query.defined();
  const bool needs_key = problems[0].grad_key.defined();

  const int64_t chunk = workspace_rows<gradient_t>(problems);
  const auto options_of_acc =
      problems[0].query.options().dtype(c10::CppTypeToScalarType<acc_t>::value);
  const auto options_of_factor = options_of_acc.dtype(c10::CppTypeToScalarType<gradient_t>::value);
  // factor dL/dS of a chunk of rows, transposed: [problems, N, chunk]
  const auto workspace = at::empty({needs_key ? count * keys * chunk : 0}, options_of_factor);
  gradient_t* const transposed = workspace.template mutable_data_ptr<gradient_t>();
  // Sums of gradients that are rounded: of a row block, and of all keys.
  const int64_t row_sums = RowSums<acc_t>::is_rounded(problems[0].grad_query) ? kRows * inner : 0;
  const bool rounds_keys = RowSums<acc_t>::is_rounded(problems[0].grad_key);
  const auto key_sums = at::empty({rounds_keys ? count * keys * inner : 0}, options_of_acc);

  for (int64_t chunk_row = 0; chunk_row < samples; chunk_row += chunk) {
    const int64_t chunk_rows = std::min(chunk, samples - chunk_row);
    const int64_t chunk_blocks = at::divup(chunk_rows, kRows);
    at::parallel_for(0, count * chunk_blocks, 1, [&](int64_t begin, int64_t end) {
      const ProductScope scope;
      const auto scratch = at::empty({3 * kRows * kColumns + row_sums}, options_of_acc);
      const auto rounded = at::empty({kRows * kColumns}, options_of_factor);
      acc_t* const products = scratch.template mutable_data_ptr<acc_t>();
      acc_t* const row_part = products + kRows * kColumns;
      acc_t* const column_part = halves ? row_part + kRows * kColumns : nullptr;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b = task / chunk_blocks;
        const int64_t row = chunk_row + task % chunk_blocks * kRows;
        const int64_t rows = std::min(kRows, samples - row);
        const auto& problem = problems[b];
        const RowSums<acc_t> grad_query(problem.grad_query, products + 3 * kRows * kColumns, row);
        for (int64_t column = 0; column < keys; column += kColumns) {
          if (interrupt.poll()) return;
          const int64_t columns = std::min(kColumns, keys - column), width = padded(columns);
          const ProductTile<factor_t> tile(problem, row, column, products);
          if (!cached) tile.form(factors[b], row, rows, column, columns);
          gradient(TilePlace{b, row, rows, column, columns}, tile, row_part, column_part);
          if (needs_query) {
            factors[b].keys.multiply(
                as_factor(row_part, rows, width, rounded.template mutable_data_ptr<gradient_t>()),
                width, rows, column, columns, 0, inner, /*add=*/column > 0 || add_to_query,
                grad_query.data(), inner);
          }
          if (needs_key) {
            transpose(column_part == nullptr ? row_part : column_part, width, rows, columns,
                      transposed + (b * keys + column) * chunk + (row - chunk_row), chunk);
          }
        }
        grad_query.finish(rows);
      }
    });
    if (needs_key) {
      multiply_queries<factor_t>(problems, transposed, chunk, chunk_row, chunk_rows,
                                 key_sums.template mutable_data_ptr<acc_t>(), interrupt);
    }
  }
}

// Calls run(group, factor_t{}, gradient_t{}) for each group of problems that share the threads.
template <typename Problem, typename Run>
void for_each_group(const std::vector<Problem>& problems, const Run& run) {
  if (problems.empty()) return;
  const int64_t samples = std::max(problems[0].query.size(0), problems[0].key.size(0));
  const auto dtype = problems[0].query.scalar_type();
  const size_t size = std::max<int64_t>(1, kRowsAtATime / samples);
  for (size_t first = 0; first < problems.size(); first += size) {
    const c10::ArrayRef<Problem> group(problems.data() + first,
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
