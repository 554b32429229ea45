// What the forward and the backward of InfoNCE share: the factors and the positives of a problem.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "common/interrupt.h"
#include "cpu/info_nce_kernel.h"
#include "cpu/logit_products.h"

namespace himo::cpu {

// Zero-pads to [padded(N)].
inline at::Tensor pad(const at::Tensor& values) {  // [N]
  // Not by tensor operations: for 128 numbers, three calls cost more than the copy itself.
  const auto source = values.contiguous();
  const auto result = at::empty({padded(values.size(0))}, values.options());
  const size_t bytes = source.nbytes();
  auto* data = static_cast<char*>(result.mutable_data_ptr());
  std::memcpy(data, source.const_data_ptr(), bytes);
  std::memset(data + bytes, 0, result.nbytes() - bytes);
  return result;
}

// The factors of a problem, and S of the positive pairs.
template <typename factor_t, typename gradient_t>
struct Factors : ProductFactors<factor_t, gradient_t> {
  at::Tensor row_positives;     // [M]
  at::Tensor column_positives;  // [padded(N)], same memory as row_positives for a whole batch

  Factors(const InfoNCE& problem, bool with_logits)
      : ProductFactors<factor_t, gradient_t>(problem, with_logits) {
    if (problem.row_positives.defined()) {
      row_positives = problem.row_positives.contiguous();
      // Undefined for columns without losses.
      if (problem.column_positives.defined()) column_positives = pad(problem.column_positives);
    } else {
      column_positives = at::zeros({padded(problem.key.size(0))}, problem.row_nll.options());
      row_positives = column_positives;
    }
  }
};

// Computes all products: a cache for the backward, or scratch of a small batch.
template <typename factor_t, typename gradient_t, template <typename, typename> typename Of>
void form_products(c10::ArrayRef<InfoNCE> problems,
                   const std::vector<Of<factor_t, gradient_t>>& factors, Interrupt& interrupt) {
  const int64_t samples = problems[0].query.size(0), keys = problems[0].key.size(0);
  const int64_t row_blocks = at::divup(samples, kRows), key_blocks = at::divup(keys, kColumns);
  const int64_t tiles = row_blocks * key_blocks, count = problems.size();
  at::parallel_for(0, count * tiles, 1, [&](int64_t begin, int64_t end) {
    const ProductScope scope;
    for (int64_t task = begin; task < end; ++task) {
      if (interrupt.poll()) return;
      const int64_t b = task / tiles, row = task % tiles / key_blocks * kRows;
      const int64_t column = task % key_blocks * kColumns;
      const ProductTile<factor_t> tile(problems[b], row, column, /*scratch=*/nullptr);
      tile.form(factors[b], row, std::min(kRows, samples - row), column,
                std::min(kColumns, keys - column), problems[b].part);
    }
  });
}

// Returns the factors of every problem. If formed, the cached products are already computed, so the
// factors of the logits are left out. For a whole batch this also fills the positives,
// S_ii = scale q_i . k_i, with the same arithmetic as the tiles, so that S_ij - S_ii is exactly 0
// where captions repeat. If there is a cache, all products are computed here, because the positives
// are their diagonal.
template <typename factor_t, typename gradient_t>
std::vector<Factors<factor_t, gradient_t>> factors_of(c10::ArrayRef<InfoNCE> problems, double scale,
                                                      bool formed, Interrupt& interrupt) {
  using acc_t = accumulator_t<factor_t>;
  constexpr int64_t kBlock = 32;  // rows and columns of a diagonal block
  std::vector<Factors<factor_t, gradient_t>> factors;
  for (const auto& problem : problems) factors.emplace_back(problem, !formed);
  if (problems[0].row_positives.defined()) return factors;
  const int64_t count = problems.size(), samples = problems[0].query.size(0);
  if (problems[0].products.defined()) {
    if (!formed) form_products(problems, factors, interrupt);
    for (int64_t b = 0; b < count; ++b) {
      const acc_t* products = problems[b].products.template const_data_ptr<acc_t>();
      acc_t* positives = factors[b].column_positives.template mutable_data_ptr<acc_t>();
      for (int64_t i = 0; i < samples; ++i) {
        positives[i] = static_cast<acc_t>(scale) * products[i * (samples + 1)];
      }
    }
    return factors;
  }
  const int64_t blocks = at::divup(samples, kBlock);
  at::parallel_for(0, count * blocks, 4, [&](int64_t begin, int64_t end) {
    const ProductScope scope;
    for (int64_t task = begin; task < end; ++task) {
      const auto& own = factors[task / blocks];
      const int64_t row = task % blocks * kBlock, rows = std::min(kBlock, samples - row);
      const int64_t stride = own.query.stride(0);
      acc_t products[kBlock * kBlock];
      own.key_transposed.multiply(own.query.template const_data_ptr<factor_t>() + row * stride,
                                  stride, rows, 0, problems[0].query.size(1), row, rows,
                                  /*add=*/false, products, kBlock);
      acc_t* positives = own.column_positives.template mutable_data_ptr<acc_t>() + row;
      for (int64_t i = 0; i < rows; ++i) {
        positives[i] = static_cast<acc_t>(scale) * products[i * kBlock + i];
      }
    }
  });
  return factors;
}

}  // namespace himo::cpu
