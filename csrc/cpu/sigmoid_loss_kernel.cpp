#include "cpu/sigmoid_loss_kernel.h"

#include <ATen/Parallel.h>

#include "common/interrupt.h"
#include "cpu/logit_gradients.h"

namespace himo::cpu {

std::vector<SigmoidSums> sigmoid_loss(const std::vector<Logits>& problems,
                                      const SigmoidOptions& options) {
  Interrupt interrupt(ProductScope::release);
  std::vector<SigmoidSums> results;
  for_each_group(problems, [&](c10::ArrayRef<Logits> group, auto factor, auto gradient) {
    using factor_t = decltype(factor);
    using gradient_t = decltype(gradient);
    using acc_t = accumulator_t<factor_t>;
    std::vector<ProductFactors<factor_t, gradient_t>> factors;
    for (const auto& problem : group) factors.emplace_back(problem, /*with_logits=*/true);
    const int64_t samples = group[0].query.size(0), blocks = at::divup(samples, kRows);
    std::vector<SigmoidSums> sums(group.size() * blocks, SigmoidSums{0, 0, 0});
    multiply_gradients<factor_t, gradient_t>(
        group, factors, /*halves=*/false, /*add_to_query=*/false, interrupt,
        [&](const TilePlace& place, const ProductTile<factor_t>& tile, acc_t* part, acc_t*) {
          const auto of_tile = loops_of(acc_t{}).sigmoid(
              {tile.data, tile.stride, place.rows, place.columns,
               place.row + options.offset - place.column, static_cast<acc_t>(options.scale),
               static_cast<acc_t>(options.bias),
               static_cast<acc_t>(options.scale / options.divisor),
               options.gradients ? part : nullptr});
          auto& sum = sums[place.row_block(samples)];
          sum.loss += of_tile.loss;
          sum.scale += of_tile.scale;
          sum.bias += of_tile.bias;
        });
    // In the order of the blocks, so the result does not depend on the number of threads.
    for (size_t b = 0; b < group.size(); ++b) {
      SigmoidSums total{0, 0, 0};
      for (int64_t block = 0; block < blocks; ++block) {
        const auto& sum = sums[b * blocks + block];
        total.loss += sum.loss / options.divisor;
        total.scale += sum.scale / options.divisor;
        total.bias += sum.bias / options.divisor;
      }
      results.push_back(total);
    }
  });
  return results;
}

}  // namespace himo::cpu
