// Means and centred blocks of x [*, N, D], for any strides and floating dtype.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <vector>

// Compiles a loop for several vector widths. GNU's C library selects one for the processor at load
// time.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define HIMO_WIDE __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define HIMO_WIDE
#endif

namespace himo::cpu {

constexpr int64_t kGrain = 16384;  // with fewer elements a second thread costs more than it saves

// Returns the at::parallel_for grain for tasks of this many elements.
inline int64_t grain(int64_t elements_per_task) {
  const int64_t elements = std::max<int64_t>(elements_per_task, 1);
  return (kGrain + elements - 1) / elements;
}

// A block holds 8 MiB of float64, or 256 lines if those are larger. With fewer lines, the memory
// traffic of the product and starting threads would dominate.
constexpr int64_t kBlockElements = 1024 * 1024;
constexpr int64_t kBlockLines = 256;

// Returns the number of lines of this length in a block.
inline int64_t block_lines(int64_t lines, int64_t length) {
  return std::min(lines, std::max(kBlockLines, kBlockElements / std::max<int64_t>(length, 1)));
}

// Returns the offset of problem b from the data pointer, in elements. A reshape to [B, N, D] would
// copy an expanded or permuted x.
int64_t problem_offset(const at::Tensor& x, int64_t b);  // [*, N, D]

// Returns the means [count, D] of problems [b, b + count), in float64 for every dtype of x. A mean
// rounded to float32 would shift all rows of X equally, the leading error if the mean is large. The
// sums are of differences from the first row, so the mean of any number of equal rows is exact.
std::vector<double> column_means(const at::Tensor& x, int64_t b, int64_t count);  // [*, N, D]

// The part of x that is centred at a time: rows and columns of problems [b, b + count).
struct Block {
  int64_t b, count;
  int64_t row, rows;
  int64_t column, columns;
};

// Writes (x - mean) * scale for the block in the memory order of x, so that reads and writes are
// contiguous. Returns whether that order is [count, rows, columns]; otherwise it is
// [count, columns, rows]. T is float or double.
template <typename T>
bool centre(const at::Tensor& x,  // [*, N, D]
            const double* means,  // [count, D]
            const Block& block, double scale,
            T* out);  // [count * rows * columns]

// Returns x - mean for the block as a tensor [count, rows, columns], in the buffer's dtype.
at::Tensor centre(const at::Tensor& x,  // [*, N, D]
                  const double* means,  // [count, D]
                  const Block& block,
                  const at::Tensor& buffer);  // [>= count * rows * columns]

// Copies the block of one problem. T is float or double.
template <typename T>
void copy_block(const at::Tensor& x,  // [*, N, D]
                const Block& block,
                T* out,  // [rows, columns]
                int64_t row_stride);

}  // namespace himo::cpu
