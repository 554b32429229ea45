// Centred products in blocks: a block of rows (covariance) or columns (gram) is centred into a
// buffer of the accumulation dtype and its product is added to the output. No [N, D] temporary is
// allocated. Extra memory: one block, and 64 * D doubles of partial sums.
//
// Block sizes depend only on the shape of x, not on the number of threads, and the order of each
// sum is fixed: results are bitwise equal from run to run at a fixed number of threads.

#include "cpu/covariance_kernel.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <vector>

#include "common/interrupt.h"
#include "cpu/centring.h"
#include "cpu/dense.h"

namespace himo::cpu {
namespace {

// Limits on the rows of the product that one call computes up to the diagonal: half the side, from
// 48 to 192. Two panels skip a quarter of the multiplications; panels of 192 rows skip 3/8 at
// D = 768. Narrower panels slow the matrix product by more than they save.
constexpr int64_t kPanel = 192, kNarrowPanel = 48;
// Below this inner size most time is spent writing the product, and one call is fastest.
constexpr int64_t kThin = 16;

constexpr int64_t kTile = 32;  // a square tile is 8 KiB in float64 and fits the L1 cache

// Problems with more elements than this are faster with their own panels than in a shared bmm.
constexpr int64_t kLargeProblem = 64 * 1024;

// Returns how many problems are processed together. Small problems share a block and one bmm,
// because a call for each would cost more than the arithmetic.
int64_t group_size(const at::Tensor& x, int64_t batch, int64_t side) {  // [*, N, D]
  const int64_t elements = std::max<int64_t>(x.size(-2) * x.size(-1), 1);
  if (side > kPanel || elements > kLargeProblem || batch == 0) return 1;
  const int64_t groups = at::divup(batch, kBlockElements / elements);
  return at::divup(batch, groups);  // equal sizes: a short last group would leave threads idle
}

// Returns how many rows (columns for gram) are centred at a time: all of them if problems share a
// block.
int64_t lines_of_group(int64_t group, int64_t lines, int64_t length) {
  return group > 1 ? lines : block_lines(lines, length);
}

template <typename T>
Matrix<T> matrix_of(const at::Tensor& tensor) {  // [M, K]
  return {static_cast<T*>(tensor.mutable_data_ptr()), tensor.size(0), tensor.size(1),
          tensor.stride(0), tensor.stride(1)};
}

// out = left right + beta out
void add_product(const at::Tensor& out,    // [M, N]
                 const at::Tensor& left,   // [M, K]
                 const at::Tensor& right,  // [K, N]
                 double beta) {
  AT_DISPATCH_FLOATING_TYPES(out.scalar_type(), "add_product", [&] {
    multiply(matrix_of<scalar_t>(left), matrix_of<scalar_t>(right), matrix_of<scalar_t>(out),
             scalar_t{1}, static_cast<scalar_t>(beta));
  });
}

// product [count, M, M] = left left^T if first, otherwise +=. A single problem is computed in
// panels of rows, each up to its diagonal block; the upper half is undefined until mirror_lower.
void add_lower_product(const at::Tensor& product,  // [count, M, M]
                       const at::Tensor& left,     // [count, M, K]
                       bool first) {
  if (product.size(0) > 1) {
    product.baddbmm_(left, left.transpose(1, 2), first ? 0 : 1);
    return;
  }
  const auto rows = left.select(0, 0), out = product.select(0, 0);
  const int64_t side = out.size(0);
  const int64_t half = at::divup(side, 2 * kTile) * kTile;
  const int64_t panel =
      first && rows.size(1) < kThin ? side : std::clamp(half, kNarrowPanel, kPanel);
  for (int64_t i = 0; i < side; i += panel) {
    const int64_t end = std::min(i + panel, side);
    add_product(out.narrow(0, i, end - i).narrow(1, 0, end), rows.narrow(0, i, end - i),
                rows.narrow(0, 0, end).t(), first ? 0 : 1);
  }
}

// Copies a tile of the lower triangle to the upper one. A full tile is transposed in register
// blocks, so that source and destination are accessed along rows.
template <typename T>
HIMO_WIDE void mirror_tile(T* matrix, int64_t side, int64_t i0, int64_t j0) {  // j0 <= i0
  constexpr int64_t kSquare = 8;
  const int64_t rows = std::min(kTile, side - i0);
  if (i0 == j0 || rows < kTile) {
    for (int64_t i = i0; i < i0 + rows; ++i) {
      const int64_t end = i0 == j0 ? i : j0 + kTile;
      for (int64_t j = j0; j < end; ++j) matrix[j * side + i] = matrix[i * side + j];
    }
    return;
  }
  for (int64_t j = j0; j < j0 + kTile; j += kSquare) {
    for (int64_t i = i0; i < i0 + kTile; i += kSquare) {
      T square[kSquare][kSquare];
      for (int64_t a = 0; a < kSquare; ++a) {
        for (int64_t b = 0; b < kSquare; ++b) square[b][a] = matrix[(i + a) * side + j + b];
      }
      for (int64_t b = 0; b < kSquare; ++b) {
        for (int64_t a = 0; a < kSquare; ++a) matrix[(j + b) * side + i + a] = square[b][a];
      }
    }
  }
}

void mirror_lower(const at::Tensor& product) {  // [count, M, M], contiguous
  const int64_t side = product.size(1), tiles = at::divup(side, kTile);
  AT_DISPATCH_FLOATING_TYPES(product.scalar_type(), "mirror_lower", [&] {
    scalar_t* data = product.mutable_data_ptr<scalar_t>();
    at::parallel_for(
        0, product.size(0) * tiles, grain(kTile * side / 2), [&](int64_t begin, int64_t end) {
          for (int64_t task = begin; task < end; ++task) {
            scalar_t* matrix = data + task / tiles * side * side;
            // Alternate long and short rows of tiles: a thread takes consecutive tasks.
            const int64_t k = task % tiles, row = k % 2 == 0 ? k / 2 : tiles - 1 - k / 2;
            for (int64_t j0 = 0; j0 <= row * kTile; j0 += kTile) {
              mirror_tile(matrix, side, row * kTile, j0);
            }
          }
        });
  });
}

void write_means(const std::vector<double>& means,
                 const at::Tensor& out) {  // [count, D], contiguous
  AT_DISPATCH_FLOATING_TYPES(out.scalar_type(), "write_means", [&] {
    std::transform(means.begin(), means.end(), out.mutable_data_ptr<scalar_t>(),
                   [](double value) { return static_cast<scalar_t>(value); });
  });
}

// target [count, n, d] = offset + left right, rounded once to the dtype of target. If that is not
// the accumulation dtype, the sum is formed in scratch.
void write_gradient(const at::Tensor& left,      // [count, n, k]
                    const at::Tensor& right,     // [count, k, d]
                    const at::Tensor& offset,    // [count, d]
                    const at::Tensor& scratch,   // [>= count * n * d], undefined if not needed
                    const at::Tensor& target) {  // [count, n, d]
  auto sum = target;
  if (scratch.defined()) sum = scratch.narrow(0, 0, target.numel()).view(target.sizes());
  sum.copy_(offset.unsqueeze(1).expand(target.sizes()));
  if (sum.size(0) > 1) {
    sum.baddbmm_(left, right);
  } else {
    add_product(sum.select(0, 0), left.select(0, 0), right.select(0, 0), 1);
  }
  if (scratch.defined()) target.copy_(sum);
}

at::Tensor scratch_like(const at::Tensor& buffer, const at::Tensor& target) {
  return buffer.scalar_type() == target.scalar_type() ? at::Tensor() : at::empty_like(buffer);
}

}  // namespace

void covariance_fwd(const at::Tensor& x,             // [*, N, D]
                    const at::Tensor& mean,          // [B, D]
                    const at::Tensor& covariance) {  // [B, D, D]
  const int64_t samples = x.size(-2), features = x.size(-1), batch = mean.size(0);
  const int64_t group = group_size(x, batch, features);
  const int64_t step = lines_of_group(group, samples, features);
  const auto buffer = at::empty({group * step * features}, mean.options());
  if (samples == 0) covariance.zero_();
  Interrupt interrupt;
  for (int64_t b = 0; b < batch; b += group) {
    const int64_t count = std::min(group, batch - b);
    const auto means = column_means(x, b, count);
    const auto product = covariance.narrow(0, b, count);
    for (int64_t row = 0; row < samples; row += step) {
      interrupt.poll();
      const Block block{b, count, row, std::min(step, samples - row), 0, features};
      const auto centred = centre(x, means.data(), block, buffer);
      add_lower_product(product, centred.transpose(1, 2), row == 0);
    }
    mirror_lower(product);
    write_means(means, mean.narrow(0, b, count));
  }
}

void gram_fwd(const at::Tensor& x,       // [*, N, D]
              const at::Tensor& mean,    // [B, D]
              const at::Tensor& gram) {  // [B, N, N]
  const int64_t samples = x.size(-2), features = x.size(-1), batch = mean.size(0);
  const int64_t group = group_size(x, batch, samples);
  const int64_t step = lines_of_group(group, features, samples);
  const auto buffer = at::empty({group * samples * step}, mean.options());
  if (features == 0) gram.zero_();
  Interrupt interrupt;
  for (int64_t b = 0; b < batch; b += group) {
    const int64_t count = std::min(group, batch - b);
    const auto means = column_means(x, b, count);
    const auto product = gram.narrow(0, b, count);
    for (int64_t column = 0; column < features; column += step) {
      interrupt.poll();
      const Block block{b, count, 0, samples, column, std::min(step, features - column)};
      add_lower_product(product, centre(x, means.data(), block, buffer), column == 0);
    }
    mirror_lower(product);
    write_means(means, mean.narrow(0, b, count));
  }
}

// dX = X (G + G^T) and grad_x = dX - mean(dX) + grad_mean / N. x is centred with its float64 mean,
// so the rows of X and of dX sum to zero and mean(dX) need not be subtracted.
void covariance_bwd(const at::Tensor& grad_mean,        // [B, D]
                    const at::Tensor& grad_covariance,  // [B, D, D]
                    const at::Tensor& x,                // [*, N, D]
                    const at::Tensor& grad_x) {         // [B, N, D]
  const int64_t samples = x.size(-2), features = x.size(-1), batch = grad_mean.size(0);
  const int64_t group = group_size(x, batch, features);
  const int64_t step = lines_of_group(group, samples, features);
  const auto buffer = at::empty({group * step * features}, grad_mean.options());
  const auto scratch = scratch_like(buffer, grad_x);
  Interrupt interrupt;
  for (int64_t b = 0; b < batch; b += group) {
    const int64_t count = std::min(group, batch - b);
    const auto means = column_means(x, b, count);
    const auto grad = grad_covariance.narrow(0, b, count);
    const auto symmetric = grad.add(grad.transpose(1, 2));           // [count, D, D]
    const auto offset = grad_mean.narrow(0, b, count).div(samples);  // [count, D]
    for (int64_t row = 0; row < samples; row += step) {
      interrupt.poll();
      const Block block{b, count, row, std::min(step, samples - row), 0, features};
      write_gradient(centre(x, means.data(), block, buffer), symmetric, offset, scratch,
                     grad_x.narrow(0, b, count).narrow(1, row, block.rows));
    }
  }
}

// dX = (G + G^T) X and grad_x = dX - mean(dX) + grad_mean / N. The mean over rows commutes with the
// product, so it is subtracted from the columns of G + G^T, [N, N].
void gram_bwd(const at::Tensor& grad_mean,  // [B, D]
              const at::Tensor& grad_gram,  // [B, N, N]
              const at::Tensor& x,          // [*, N, D]
              const at::Tensor& mean,       // [B, D]
              const at::Tensor& grad_x) {   // [B, N, D]
  const int64_t samples = x.size(-2), features = x.size(-1), batch = grad_mean.size(0);
  const int64_t group = group_size(x, batch, samples);
  const int64_t step = lines_of_group(group, features, samples);
  const auto buffer = at::empty({group * samples * step}, grad_mean.options());
  const auto scratch = scratch_like(buffer, grad_x);
  const auto means = mean.to(at::kDouble).contiguous();  // [B, D]
  Interrupt interrupt;
  for (int64_t b = 0; b < batch; b += group) {
    const int64_t count = std::min(group, batch - b);
    const auto grad = grad_gram.narrow(0, b, count);
    const auto symmetric = grad.add(grad.transpose(1, 2));  // [count, N, N]
    symmetric.sub_(symmetric.mean(1, /*keepdim=*/true));
    const auto offset = grad_mean.narrow(0, b, count).div(samples);  // [count, D]
    const double* shift = means.const_data_ptr<double>() + b * features;
    for (int64_t column = 0; column < features; column += step) {
      interrupt.poll();
      const Block block{b, count, 0, samples, column, std::min(step, features - column)};
      write_gradient(symmetric, centre(x, shift, block, buffer),
                     offset.narrow(1, column, block.columns), scratch,
                     grad_x.narrow(0, b, count).narrow(2, column, block.columns));
    }
  }
}

}  // namespace himo::cpu
