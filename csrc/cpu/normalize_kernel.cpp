// Each row is read twice, from memory and then from L1. Nothing is allocated, except one row per
// thread if the entries of x are not contiguous. A row is summed by one thread, so results do not
// depend on the number of threads.

#include "cpu/normalize_kernel.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include "cpu/centring.h"
#include "cpu/row_loops.h"
#include "cpu/rows.h"

namespace himo::cpu {
namespace {

// Calls row_range(begin, end) on ranges of rows of x [*, N, D], in parallel if there are many.
template <typename function_t>
void over_rows(const at::Tensor& x, const function_t& row_range) {
  if (x.numel() == 0) return;
  at::parallel_for(0, x.numel() / x.size(-1), grain(x.size(-1)), row_range);
}

}  // namespace

void normalize_fwd(const at::Tensor& x,             // [*, N, D]
                   const at::Tensor& normalized) {  // [*, N, D]
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "normalize_fwd", [&] {
    const auto* from = elements(const_cast<scalar_t*>(x.const_data_ptr<scalar_t>()));
    auto* const to = elements(normalized.mutable_data_ptr<scalar_t>());
    const int64_t size = x.size(-1);
    over_rows(x, [&](int64_t begin, int64_t end) {
      Rows rows(x, from);
      for (int64_t i = begin; i < end; ++i)
        row_loops_of(from).normalize(rows(i), size, to + i * size);
    });
  });
}

void normalize_bwd(const at::Tensor& grad,      // [*, N, D]
                   const at::Tensor& x,         // [*, N, D]
                   const at::Tensor& grad_x) {  // [*, N, D]
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "normalize_bwd", [&] {
    const auto* from = elements(const_cast<scalar_t*>(x.const_data_ptr<scalar_t>()));
    const auto* incoming = elements(const_cast<scalar_t*>(grad.const_data_ptr<scalar_t>()));
    auto* const to = elements(grad_x.mutable_data_ptr<scalar_t>());
    const int64_t size = x.size(-1);
    over_rows(x, [&](int64_t begin, int64_t end) {
      Rows rows(x, from), grads(grad, incoming);
      for (int64_t i = begin; i < end; ++i) {
        row_loops_of(from).normalize_gradient(grads(i), rows(i), size, to + i * size);
      }
    });
  });
}

}  // namespace himo::cpu
