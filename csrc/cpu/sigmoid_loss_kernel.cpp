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
    const auto of_tile = [&](const Place<acc_t>& place, acc_t* part, acc_t*) {
      return loops_of(acc_t{}).sigmoid(
          {place.products, place.stride, place.rows, place.columns,
           place.row + options.offset - place.column, static_cast<acc_t>(options.scale),
           static_cast<acc_t>(options.bias), static_cast<acc_t>(options.scale / options.divisor),
           options.gradients ? part : nullptr});
    };
    const auto sums = multiply_gradients<factor_t, gradient_t>(
        group, factors, /*halves=*/false, /*add_to_query=*/false, of_tile, interrupt);
    // In the order of the blocks, so the result does not depend on the number of threads.
    for (size_t b = 0; b < group.size(); ++b) {
      SigmoidSums total;
      for (int64_t block = 0; block < blocks; ++block) total += sums[b * blocks + block];
      total.loss /= options.divisor;
      total.scale /= options.divisor;
      total.bias /= options.divisor;
      results.push_back(total);
    }
  });
  return results;
}

}  // namespace himo::cpu
