// A product is summed by one thread, so results do not depend on the number of threads.

#include "cpu/row_products.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include "cpu/row_loops.h"
#include "cpu/rows.h"

namespace himo::cpu {

void row_products(const at::Tensor& x, const at::Tensor& y, const at::Tensor& places,
                  const at::Tensor& products) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "row_products", [&] {
    const auto* left = elements(const_cast<scalar_t*>(x.const_data_ptr<scalar_t>()));
    const auto* right = elements(const_cast<scalar_t*>(y.const_data_ptr<scalar_t>()));
    const auto& loops = row_loops_of(left);
    using acc_t = decltype(loops.product(left, right, 0));
    const auto* place = places.const_data_ptr<int64_t>();
    auto* out = products.mutable_data_ptr<acc_t>();
    const int64_t samples = x.size(-2), others = y.size(-2), size = x.size(-1);
    at::parallel_for(0, places.numel(), grain(size), [&](int64_t begin, int64_t end) {
      Rows own(x, left), other(y, right);
      for (int64_t i = begin; i < end; ++i) {
        out[i] = loops.product(own(i), other(i / samples * others + place[i]), size);
      }
    });
  });
}

}  // namespace himo::cpu
