// The products query key^T by tiles, which the losses turn into logits, and their factors.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>

#include "cpu/tile_loops.h"
#include "cpu/tile_products.h"

namespace himo::cpu {

// A row block (192 KiB of float at K = 768), a tile (64 KiB) and its gradient fit in L2 together.
constexpr int64_t kRows = kTileRows, kColumns = kTileColumns;
static_assert(kColumns == RightFactor<float>::kColumns);

inline const auto& loops_of(float) { return tile_loops().float32; }
inline const auto& loops_of(double) { return tile_loops().float64; }

// The features of a problem whose logits are scale query key^T, and their gradients. acc is float,
// or double for double features.
struct Logits {
  at::Tensor query;     // [M, K], any strides
  at::Tensor key;       // [N, K], any strides, dtype of query
  at::Tensor products;  // [M, N] acc: query key^T, cached for the backward; or undefined
  // Undefined if not needed. A gradient of bfloat16 is summed in float and rounded once.
  at::Tensor grad_query;  // [M, K] acc or bfloat16, contiguous
  at::Tensor grad_key;    // [N, K] acc or bfloat16, contiguous
};

// The features laid out for the tile products of the logits and of the gradients.
template <typename factor_t, typename gradient_t>
struct ProductFactors {
  using acc_t = accumulator_t<factor_t>;
  at::Tensor query;                      // left [M, K]
  RightFactor<factor_t> key_transposed;  // right [K, N]
  RightFactor<gradient_t> keys;          // right [N, K]

  ProductFactors(const Logits& problem, bool with_logits) {
    if (with_logits) {
      query = left_factor<factor_t>(problem.query);
      key_transposed = RightFactor<factor_t>(problem.key.t());
    }
    if (problem.grad_query.defined()) keys = RightFactor<gradient_t>(problem.key);
  }
};

// Where a tile begins, and how large it is.
struct TilePlace {
  int64_t problem, row, rows, column, columns;

  // Of the sums over a row block. One thread has all tiles of a row block.
  int64_t row_block(int64_t samples) const {
    return problem * at::divup(samples, kRows) + row / kRows;
  }
};

// A tile of query key^T: in scratch, or in the cached products if there are any.
template <typename factor_t>
struct ProductTile {
  using acc_t = accumulator_t<factor_t>;
  acc_t* data;
  int64_t stride;

  ProductTile(const Logits& problem, int64_t row, int64_t column, acc_t* scratch) {
    if (problem.products.defined()) {
      stride = problem.products.size(1);
      data = problem.products.template mutable_data_ptr<acc_t>() + row * stride + column;
    } else {
      stride = kColumns;
      data = scratch;
    }
  }

  // Sums parts of `part` terms, if given, and then the parts, which rounds less.
  template <typename Factors>
  void form(const Factors& factors, int64_t row, int64_t rows, int64_t column, int64_t columns,
            int64_t part = 0) const {
    const int64_t query_stride = factors.query.stride(0), inner = factors.query.size(1);
    const int64_t most = part > 0 ? part : std::max<int64_t>(inner, 1);
    const factor_t* query = factors.query.template const_data_ptr<factor_t>() + row * query_stride;
    for (int64_t k = 0; k == 0 || k < inner; k += most) {
      factors.key_transposed.multiply(query + k, query_stride, rows, k, std::min(most, inner - k),
                                      column, columns, /*add=*/k > 0, data, stride);
    }
  }
};

}  // namespace himo::cpu
