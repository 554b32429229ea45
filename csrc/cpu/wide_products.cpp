// One thread computes a block of the product, over the whole inner dimension in order. It packs a
// block of b into panels that are three registers wide, and multiplies each by register tiles of 8
// rows. Rows of a are read in place, or packed if they are not contiguous.

#include "cpu/wide_products.h"

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>

// The functions marked so are compiled for AVX-512, though the file is not.
#if defined(__x86_64__) && defined(__GNUC__)
#define HIMO_WIDE_PRODUCTS
#define HIMO_AVX512 __attribute__((target("avx512f")))
#else
#define HIMO_AVX512
#endif

namespace himo::cpu {

bool multiplies_wide() {
#ifdef HIMO_WIDE_PRODUCTS
  static const bool multiplies = __builtin_cpu_supports("avx512f") && !__builtin_cpu_is("intel") &&
                                 at::get_cpu_capability() == "AVX512";
  return multiplies;
#else
  return false;
#endif
}

namespace {

constexpr int64_t kStrip = 8;       // rows of a register tile
constexpr int64_t kVectors = 3;     // vectors per row: 24 sums + 3 of b + 1 broadcast, of 32
constexpr int64_t kInner = 192;     // rows of a panel: 36 KiB, which fit L1
constexpr int64_t kPanels = 8;      // panels per block: 288 KiB, which fit L2
constexpr int64_t kRows = 512;      // maximum rows of a block; 384 KiB in float32
constexpr double kForkFlops = 2e6;  // below, a second thread costs more than it saves

template <typename T>
constexpr int64_t kLanes = 64 / sizeof(T);
template <typename T>
constexpr int64_t kPanel = kVectors * kLanes<T>;  // columns

// A factor with arbitrary strides: entry (i, k) is data[i * row + k * column].
template <typename T>
struct Factor {
  const T* data;
  int64_t row, column;  // strides
};

// out [rows <= 8, columns] = alpha a b + beta out, with b packed as [inner][vectors] and a either
// packed as [inner][8] or with contiguous rows. If rows < 8, the last row is repeated; the repeated
// results are not stored.
template <typename T, int vectors, bool packed>
HIMO_AVX512 void register_tile(int64_t rows, int64_t columns, int64_t inner, T alpha,
                               const Factor<T>& a, const T* b, T beta, T* out, int64_t stride) {
  using lanes_t __attribute__((vector_size(64), aligned(sizeof(T)))) = T;
  const T* lines[kStrip];
  for (int64_t i = 0; i < kStrip; ++i) {
    lines[i] = packed ? a.data + i : a.data + std::min(i, rows - 1) * a.row;
  }
  lanes_t sums[kStrip][vectors] = {};
  for (int64_t k = 0; k < inner; ++k) {
    lanes_t right[vectors];
#pragma GCC unroll 3
    for (int v = 0; v < vectors; ++v) {
      right[v] = *reinterpret_cast<const lanes_t*>(b + (k * vectors + v) * kLanes<T>);
    }
#pragma GCC unroll 8
    for (int64_t i = 0; i < kStrip; ++i) {
      const T left = lines[i][packed ? k * kStrip : k];
#pragma GCC unroll 3
      for (int v = 0; v < vectors; ++v) sums[i][v] += left * right[v];
    }
  }
#pragma GCC unroll 8
  for (int64_t i = 0; i < kStrip; ++i) {
    if (i >= rows) break;
#pragma GCC unroll 3
    for (int v = 0; v < vectors; ++v) {
      const int64_t count = columns - v * kLanes<T>;
      T* to = out + i * stride + v * kLanes<T>;
      const lanes_t value = alpha * sums[i][v];
      if (count >= kLanes<T>) {
        lanes_t* whole = reinterpret_cast<lanes_t*>(to);
        *whole = beta == 0 ? value : value + beta * *whole;
      } else {
        for (int64_t j = 0; j < count; ++j) to[j] = beta == 0 ? value[j] : value[j] + beta * to[j];
      }
    }
  }
}

// packed[k][j] = b(k, j), with zeros from `columns` to `width`.
template <typename T>
HIMO_AVX512 void pack_panel(const Factor<T>& b, int64_t inner, int64_t columns, int64_t width,
                            T* packed) {
  if (b.column == 1 && columns == width) {
    for (int64_t k = 0; k < inner; ++k) {
      for (int64_t j = 0; j < width; ++j) packed[k * width + j] = b.data[k * b.row + j];
    }
    return;
  }
  for (int64_t first = 0; first < inner; first += kStrip) {  // whole cache lines on both sides
    const int64_t last = std::min(first + kStrip, inner);
    for (int64_t j = 0; j < columns; ++j) {
      for (int64_t k = first; k < last; ++k) {
        packed[k * width + j] = b.data[k * b.row + j * b.column];
      }
    }
    for (int64_t k = first; k < last; ++k) {
      std::fill(packed + k * width + columns, packed + (k + 1) * width, T{0});
    }
  }
}

// packed[k][i] = a(i, k) for 8 rows; if rows < 8, the last row is repeated.
template <typename T>
HIMO_AVX512 void pack_strip(const Factor<T>& a, int64_t rows, int64_t inner, T* packed) {
  if (rows == kStrip && a.row == 1) {
    for (int64_t k = 0; k < inner; ++k) {
      for (int64_t i = 0; i < kStrip; ++i) packed[k * kStrip + i] = a.data[k * a.column + i];
    }
    return;
  }
  for (int64_t k = 0; k < inner; ++k) {
    for (int64_t i = 0; i < kStrip; ++i) {
      packed[k * kStrip + i] = a.data[std::min(i, rows - 1) * a.row + k * a.column];
    }
  }
}

template <typename T, bool packed>
void multiply_panel(int64_t rows, int64_t columns, int64_t inner, T alpha, Factor<T> a, const T* b,
                    T beta, T* out, int64_t stride) {
  const int64_t vectors = at::divup(columns, kLanes<T>);
  const auto tile = vectors == 1   ? register_tile<T, 1, packed>
                    : vectors == 2 ? register_tile<T, 2, packed>
                                   : register_tile<T, 3, packed>;
  for (int64_t i = 0; i < rows; i += kStrip) {
    tile(std::min(kStrip, rows - i), columns, inner, alpha, a, b, beta, out + i * stride, stride);
    a.data += packed ? kStrip * inner : kStrip * a.row;
  }
}

// out = alpha a b + beta out, for at most kRows rows and kPanels panels of columns.
template <typename T>
void multiply_block(int64_t rows, int64_t columns, int64_t inner, T alpha, const Factor<T>& a,
                    const Factor<T>& b, T beta, T* out, int64_t stride) {
  const bool packs = a.column != 1;
  const int64_t strips = at::divup(rows, kStrip) * kStrip, depth = std::min(kInner, inner);
  const auto memory = c10::GetCPUAllocator()->allocate((kPanel<T> + (packs ? strips : 0)) * depth *
                                                       sizeof(T));  // aligned to 64 bytes
  T* panel = static_cast<T*>(memory.get());
  T* packed = panel + kPanel<T> * depth;
  for (int64_t k = 0; k < inner; k += kInner) {
    const int64_t count = std::min(kInner, inner - k);
    const Factor<T> left{a.data + k * a.column, a.row, a.column};
    for (int64_t i = 0; packs && i < rows; i += kStrip) {
      const Factor<T> strip{left.data + i * a.row, a.row, a.column};
      pack_strip(strip, std::min(kStrip, rows - i), count, packed + i * count);
    }
    const T factor = k == 0 ? beta : 1;
    for (int64_t j = 0; j < columns; j += kPanel<T>) {
      const int64_t width = std::min(kPanel<T>, columns - j);
      const Factor<T> right{b.data + k * b.row + j * b.column, b.row, b.column};
      pack_panel(right, count, width, at::divup(width, kLanes<T>) * kLanes<T>, panel);
      if (packs) {
        multiply_panel<T, true>(rows, width, count, alpha, {packed, 0, 0}, panel, factor, out + j,
                                stride);
      } else {
        multiply_panel<T, false>(rows, width, count, alpha, left, panel, factor, out + j, stride);
      }
    }
  }
}

}  // namespace

template <typename T>
void multiply_wide(Matrix<const T> a, Matrix<const T> b, Matrix<T> out, T alpha, T beta) {
  const double flops = 2.0 * static_cast<double>(out.rows * out.columns) * a.columns;
  const bool alone = at::in_parallel_region() || flops < kForkFlops;
  const int64_t threads = alone ? 1 : at::get_num_threads();
  int64_t row_blocks = at::divup(out.rows, kRows);
  int64_t column_blocks = at::divup(out.columns, kPanels * kPanel<T>);
  if (row_blocks * column_blocks % threads != 0) {  // give all threads equally many blocks
    int64_t& blocks = out.rows >= out.columns ? row_blocks : column_blocks;
    blocks = at::divup(blocks, threads) * threads;
  }
  const int64_t rows = at::divup(at::divup(out.rows, row_blocks), kStrip) * kStrip;
  const int64_t columns = at::divup(at::divup(out.columns, column_blocks), kPanel<T>) * kPanel<T>;
  const auto multiply_blocks = [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t i = block / column_blocks * rows, j = block % column_blocks * columns;
      if (i >= out.rows || j >= out.columns) continue;
      multiply_block<T>(std::min(rows, out.rows - i), std::min(columns, out.columns - j), a.columns,
                        alpha, {a.data + i * a.row_stride, a.row_stride, a.column_stride},
                        {b.data + j * b.column_stride, b.row_stride, b.column_stride}, beta,
                        out.data + i * out.row_stride + j, out.row_stride);
    }
  };
  if (threads == 1) return multiply_blocks(0, row_blocks * column_blocks);
  at::parallel_for(0, row_blocks * column_blocks, 1, multiply_blocks);
}

template void multiply_wide(Matrix<const float>, Matrix<const float>, Matrix<float>, float, float);
template void multiply_wide(Matrix<const double>, Matrix<const double>, Matrix<double>, double,
                            double);

}  // namespace himo::cpu
