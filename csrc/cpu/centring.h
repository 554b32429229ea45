// Means and centred blocks of x [*, N, D], for any strides and floating dtype.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <vector>

// Loops over memory are compiled for wider vectors too; the processor chooses at load time, by what
// GNU's C library has for that.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define HIMO_WIDE __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define HIMO_WIDE
#endif

namespace himo::cpu {

constexpr int64_t kGrain = 16384;  // elements below which a second thread costs more than it saves

// Returns the grain of at::parallel_for for tasks of this many elements.
inline int64_t grain(int64_t elements_per_task) {
  const int64_t elements = std::max<int64_t>(elements_per_task, 1);
  return (kGrain + elements - 1) / elements;
}

// A block holds 8 MiB of float64, or 256 lines where those are longer than that: fewer would spend
// the time on the product's own memory, and on starting threads.
constexpr int64_t kBlockElements = 1024 * 1024;
constexpr int64_t kBlockLines = 256;

// Returns how many of the lines of this length make a block.
inline int64_t block_lines(int64_t lines, int64_t length) {
  return std::min(lines, std::max(kBlockLines, kBlockElements / std::max<int64_t>(length, 1)));
}

// Returns where problem b begins, in elements from the data pointer. A reshape of x to [B, N, D]
// would copy an expanded or permuted x whole.
int64_t problem_offset(const at::Tensor& x, int64_t b);  // [*, N, D]

// Returns the means [count, D] of problems b to b + count, in float64 whatever the dtype of x:
// rounding one to float32 would shift every row of X alike, which a large mean turns into the
// leading error. Sums are of differences from the first row: the mean of equal rows is that row,
// however many they are.
std::vector<double> column_means(const at::Tensor& x, int64_t b, int64_t count);  // [*, N, D]

// The part of x that is centred at a time: rows and columns of problems b to b + count.
struct Block {
  int64_t b, count;
  int64_t row, rows;
  int64_t column, columns;
};

// Writes (x - mean) * scale for the block, [count, rows, columns], in the order x has in memory, so
// that both sides are read and written along it. Returns whether that is rows first. T is float or
// double.
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
