#include "cpu/centring.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

namespace himo::cpu {
namespace {

// The mean is summed in blocks of rows, and the partial sums are added in order. A block has at
// least 64 rows, so that two threads share 128 rows; 64 blocks at most limit the partial sums.
constexpr int64_t kMeanRows = 64;
constexpr int64_t kMeanBlocks = 64;
constexpr int64_t kMeanColumns = 512;  // 4 KiB of partial sums, which stay in the L1 cache

// sums[j] += x[i, j] - first[j]; the inner loop runs along the smaller stride.
template <typename scalar_t>
HIMO_WIDE void add_rows(const scalar_t* x,  // [rows, columns]
                        int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride,
                        const double* first,  // [columns]
                        double* sums) {       // [columns]
  if (column_stride <= row_stride) {
    for (int64_t i = 0; i < rows; ++i) {
      const scalar_t* row = x + i * row_stride;
      if (column_stride == 1) {
        for (int64_t j = 0; j < columns; ++j) sums[j] += static_cast<double>(row[j]) - first[j];
      } else {
        for (int64_t j = 0; j < columns; ++j) {
          sums[j] += static_cast<double>(row[j * column_stride]) - first[j];
        }
      }
    }
    return;
  }
  for (int64_t j = 0; j < columns; ++j) {
    const scalar_t* column = x + j * column_stride;
    double sum = 0;
    for (int64_t i = 0; i < rows; ++i)
      sum += static_cast<double>(column[i * row_stride]) - first[j];
    sums[j] += sum;
  }
}

// out[k] = scale * (x[k * stride] - mean[k * mean_step]); mean_step is 0 or 1. Computed in float64
// and rounded once.
template <typename in_t, typename out_t>
HIMO_WIDE void centre_line(const in_t* x, int64_t stride, const double* mean, int64_t mean_step,
                           int64_t size, double scale, out_t* out) {
  if (stride != 1) {
    for (int64_t k = 0; k < size; ++k) {
      out[k] =
          static_cast<out_t>(scale * (static_cast<double>(x[k * stride]) - mean[k * mean_step]));
    }
  } else if (mean_step == 1) {
    for (int64_t k = 0; k < size; ++k) {
      out[k] = static_cast<out_t>(scale * (static_cast<double>(x[k]) - mean[k]));
    }
  } else {
    const double shift = mean[0];
    for (int64_t k = 0; k < size; ++k) {
      out[k] = static_cast<out_t>(scale * (static_cast<double>(x[k]) - shift));
    }
  }
}

template <typename in_t, typename out_t>
HIMO_WIDE void copy_line(const in_t* in, int64_t stride, int64_t size, out_t* out) {
  if (stride == 1) {
    for (int64_t k = 0; k < size; ++k) out[k] = static_cast<out_t>(in[k]);
  } else {
    for (int64_t k = 0; k < size; ++k) out[k] = static_cast<out_t>(in[k * stride]);
  }
}

}  // namespace

int64_t problem_offset(const at::Tensor& x, int64_t b) {  // [*, N, D]
  int64_t offset = 0;
  for (int64_t dim = x.dim() - 3; dim >= 0; --dim) {
    offset += b % x.size(dim) * x.stride(dim);
    b /= x.size(dim);
  }
  return offset;
}

std::vector<double> column_means(const at::Tensor& x, int64_t b, int64_t count) {  // [*, N, D]
  const int64_t samples = x.size(-2), features = x.size(-1);
  const int64_t row_stride = x.stride(-2), column_stride = x.stride(-1);
  const int64_t blocks = std::clamp(at::divup(samples, kMeanRows), int64_t{1}, kMeanBlocks);
  const int64_t block_rows = at::divup(samples, blocks);
  const int64_t column_blocks = at::divup(features, kMeanColumns);
  std::vector<double> partial(count * blocks * features, 0.0);  // [count, blocks, D]
  std::vector<double> firsts(count * features);                 // [count, D], row 0
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "column_means", [&] {
    const scalar_t* data = x.const_data_ptr<scalar_t>();
    for (int64_t problem = 0; problem < count; ++problem) {
      copy_line(data + problem_offset(x, b + problem), column_stride, features,
                firsts.data() + problem * features);
    }
    const auto sum_block = [&](int64_t problem, int64_t block, int64_t column_block) {
      const int64_t i = block * block_rows, j = column_block * kMeanColumns;
      if (i >= samples) return;  // rounding up the block size may leave the last blocks empty
      add_rows(data + problem_offset(x, b + problem) + i * row_stride + j * column_stride,
               std::min(block_rows, samples - i), std::min(kMeanColumns, features - j), row_stride,
               column_stride, firsts.data() + problem * features + j,
               partial.data() + (problem * blocks + block) * features + j);
    };
    at::parallel_for(0, count * blocks * column_blocks,
                     grain(block_rows * std::min(features, kMeanColumns)),
                     [&](int64_t begin, int64_t end) {
                       for (int64_t task = begin; task < end; ++task) {
                         const int64_t rest = task / column_blocks;
                         sum_block(rest / blocks, rest % blocks, task % column_blocks);
                       }
                     });
  });
  std::vector<double> means(count * features, 0.0);  // [count, D]
  for (int64_t problem = 0; problem < count; ++problem) {
    double* mean = means.data() + problem * features;
    for (int64_t block = 0; block < blocks; ++block) {
      const double* sums = partial.data() + (problem * blocks + block) * features;
      for (int64_t j = 0; j < features; ++j) mean[j] += sums[j];
    }
    const double* first = firsts.data() + problem * features;
    for (int64_t j = 0; j < features; ++j) {
      mean[j] = first[j] + mean[j] / static_cast<double>(samples);
    }
  }
  return means;
}

template <typename T>
bool centre(const at::Tensor& x,  // [*, N, D]
            const double* means,  // [count, D]
            const Block& block, double scale,
            T* out) {  // [count * rows * columns]
  const int64_t row_stride = x.stride(-2), column_stride = x.stride(-1), features = x.size(-1);
  const bool by_rows = column_stride <= row_stride;
  const int64_t lines = by_rows ? block.rows : block.columns;
  const int64_t length = by_rows ? block.columns : block.rows;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "centre", [&] {
    const scalar_t* data =
        x.const_data_ptr<scalar_t>() + block.row * row_stride + block.column * column_stride;
    at::parallel_for(0, block.count * lines, grain(length), [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t problem = task / lines, line = task % lines;
        const scalar_t* source = data + problem_offset(x, block.b + problem);
        const double* mean = means + problem * features + block.column;
        if (by_rows) {
          centre_line(source + line * row_stride, column_stride, mean, 1, length, scale,
                      out + task * length);
        } else {
          centre_line(source + line * column_stride, row_stride, mean + line, 0, length, scale,
                      out + task * length);
        }
      }
    });
  });
  return by_rows;
}

template bool centre(const at::Tensor&, const double*, const Block&, double, float*);
template bool centre(const at::Tensor&, const double*, const Block&, double, double*);

at::Tensor centre(const at::Tensor& x,  // [*, N, D]
                  const double* means,  // [count, D]
                  const Block& block,
                  const at::Tensor& buffer) {  // [>= count * rows * columns]
  bool by_rows = true;
  AT_DISPATCH_FLOATING_TYPES(buffer.scalar_type(), "centre", [&] {
    by_rows = centre(x, means, block, 1.0, buffer.mutable_data_ptr<scalar_t>());
  });
  const int64_t lines = by_rows ? block.rows : block.columns;
  const int64_t length = by_rows ? block.columns : block.rows;
  const auto centred =
      buffer.narrow(0, 0, block.count * lines * length).view({block.count, lines, length});
  return by_rows ? centred : centred.transpose(1, 2);
}

template <typename T>
void copy_block(const at::Tensor& x,  // [*, N, D]
                const Block& block,
                T* out,  // [rows, columns]
                int64_t row_stride) {
  constexpr int64_t kRows = 32;  // rows at a time: limits the cache lines written per column of x
  const int64_t x_rows = x.stride(-2), x_columns = x.stride(-1);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "copy_block", [&] {
    const scalar_t* data = x.const_data_ptr<scalar_t>() + problem_offset(x, block.b) +
                           block.row * x_rows + block.column * x_columns;
    const auto copy_rows = [&](int64_t i0, int64_t i1) {
      if (x_columns <= x_rows) {
        for (int64_t i = i0; i < i1; ++i) {
          copy_line(data + i * x_rows, x_columns, block.columns, out + i * row_stride);
        }
        return;
      }
      for (int64_t j = 0; j < block.columns; ++j) {
        for (int64_t i = i0; i < i1; ++i) {
          out[i * row_stride + j] = static_cast<T>(data[i * x_rows + j * x_columns]);
        }
      }
    };
    at::parallel_for(0, at::divup(block.rows, kRows), grain(kRows * block.columns),
                     [&](int64_t begin, int64_t end) {
                       for (int64_t i = begin; i < end; ++i) {
                         copy_rows(i * kRows, std::min((i + 1) * kRows, block.rows));
                       }
                     });
  });
}

template void copy_block(const at::Tensor&, const Block&, float*, int64_t);
template void copy_block(const at::Tensor&, const Block&, double*, int64_t);

}  // namespace himo::cpu
