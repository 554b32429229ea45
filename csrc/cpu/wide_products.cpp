// Blocks of the inner dimension: the right factor's is packed into panels of two registers, once
// for all threads; each task packs the left factor's rows in strips of 8 and runs register tiles.

#include "cpu/wide_products.h"

#include <ATen/Parallel.h>
#include <ATen/Version.h>

#include <algorithm>
#include <memory>

#if defined(__x86_64__) && defined(__GNUC__)
#define HIMO_WIDE_PRODUCTS
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

// Rows of a register tile: 8 x 2 sums hide the latency of a multiply-add.
constexpr int64_t kStrip = 8;
template <typename T>
constexpr int64_t kPanel = 128 / sizeof(T);  // columns of a register tile
constexpr int64_t kInner = 256;              // a panel of 32 KiB, in the first-level cache
constexpr int64_t kRows = 64;                // rows of a task at most

#ifdef HIMO_WIDE_PRODUCTS
#define HIMO_AVX512 __attribute__((target("avx512f")))
#else
#define HIMO_AVX512
#endif

// tile[8, panel] = left strip [inner, 8] times panel [inner, panel].
template <typename T>
HIMO_AVX512 void register_tile(const T* strip, const T* panel, int64_t inner, T* tile) {
  using lanes_t __attribute__((vector_size(64))) = T;
  using unaligned_t __attribute__((vector_size(64), aligned(sizeof(T)))) = T;
  constexpr int64_t kLanes = 64 / sizeof(T);
  lanes_t low[kStrip] = {}, high[kStrip] = {};
  for (int64_t k = 0; k < inner; ++k) {
    const lanes_t low_row = *reinterpret_cast<const unaligned_t*>(panel + k * 2 * kLanes);
    const lanes_t high_row = *reinterpret_cast<const unaligned_t*>(panel + k * 2 * kLanes + kLanes);
#pragma GCC unroll 8
    for (int64_t i = 0; i < kStrip; ++i) {
      low[i] += strip[k * kStrip + i] * low_row;
      high[i] += strip[k * kStrip + i] * high_row;
    }
  }
#pragma GCC unroll 8
  for (int64_t i = 0; i < kStrip; ++i) {
    *reinterpret_cast<unaligned_t*>(tile + i * 2 * kLanes) = low[i];
    *reinterpret_cast<unaligned_t*>(tile + i * 2 * kLanes + kLanes) = high[i];
  }
}

// out = alpha tile + beta out, of which rows and columns are inside.
template <typename T>
HIMO_AVX512 void write_tile(const T* tile, int64_t rows, int64_t columns, T alpha, T beta, T* out,
                            int64_t stride) {
  for (int64_t i = 0; i < rows; ++i) {
    const T* from = tile + i * kPanel<T>;
    T* to = out + i * stride;
    if (beta == 0) {
      for (int64_t j = 0; j < columns; ++j) to[j] = alpha * from[j];
    } else {
      for (int64_t j = 0; j < columns; ++j) to[j] = alpha * from[j] + beta * to[j];
    }
  }
}

// packed[l / width][k][l % width] = lines l of the source along k, 0 past the last.
template <typename T>
void pack(const T* source, int64_t line_stride, int64_t inner_stride, int64_t lines, int64_t inner,
          int64_t width, T* packed) {
  for (int64_t first = 0; first < lines; first += width, packed += inner * width) {
    const int64_t count = std::min(width, lines - first);
    const T* from = source + first * line_stride;
    for (int64_t k = 0; k < inner; ++k) {
      for (int64_t l = 0; l < count; ++l) {
        packed[k * width + l] = from[l * line_stride + k * inner_stride];
      }
      for (int64_t l = count; l < width; ++l) packed[k * width + l] = 0;
    }
  }
}

}  // namespace

template <typename T>
void multiply_wide(Matrix<const T> a, Matrix<const T> b, Matrix<T> out, T alpha, T beta) {
  const int64_t rows = out.rows, columns = out.columns;
  const int64_t panels = at::divup(columns, kPanel<T>);
  // Tasks are blocks of rows, and of panels where there are few rows: four a thread or so.
  const int64_t wanted = 4 * at::get_num_threads();
  const int64_t task_rows =
      std::clamp(at::divup(at::divup(rows, wanted), kStrip) * kStrip, kStrip, kRows);
  const int64_t row_tasks = at::divup(rows, task_rows);
  const int64_t splits = std::clamp(wanted / row_tasks, int64_t{1}, panels);
  const int64_t task_panels = at::divup(panels, splits);
  const std::unique_ptr<T[]> packed(new T[panels * kPanel<T> * std::min(kInner, a.columns)]);
  for (int64_t first = 0; first < a.columns; first += kInner) {
    const int64_t inner = std::min(kInner, a.columns - first);
    at::parallel_for(0, panels, 8, [&](int64_t begin, int64_t end) {
      const int64_t lines = std::min(columns, end * kPanel<T>) - begin * kPanel<T>;
      pack(b.data + begin * kPanel<T> * b.column_stride + first * b.row_stride, b.column_stride,
           b.row_stride, lines, inner, kPanel<T>, packed.get() + begin * kPanel<T> * inner);
    });
    const T factor = first == 0 ? beta : 1;
    at::parallel_for(0, row_tasks * splits, 1, [&](int64_t begin, int64_t end) {
      // Up to 128 KiB, which a worker's stack (OMP_STACKSIZE) need not have.
      const std::unique_ptr<T[]> strips(new T[task_rows * inner]);
      T tile[kStrip * kPanel<T>];
      int64_t packed_row = -1;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t row = task / splits * task_rows, last = std::min(rows, row + task_rows);
        if (row != packed_row) {
          pack(a.data + row * a.row_stride + first * a.column_stride, a.row_stride, a.column_stride,
               last - row, inner, kStrip, strips.get());
          packed_row = row;
        }
        const int64_t panel_end = std::min(panels, (task % splits + 1) * task_panels);
        for (int64_t panel = task % splits * task_panels; panel < panel_end; ++panel) {
          const int64_t column = panel * kPanel<T>;
          for (int64_t i = row; i < last; i += kStrip) {
            register_tile(strips.get() + (i - row) * inner, packed.get() + column * inner, inner,
                          tile);
            write_tile(tile, std::min(kStrip, last - i), std::min(kPanel<T>, columns - column),
                       alpha, factor, out.data + i * out.row_stride + column, out.row_stride);
          }
        }
      }
    });
  }
}

template void multiply_wide(Matrix<const float>, Matrix<const float>, Matrix<float>, float, float);
template void multiply_wide(Matrix<const double>, Matrix<const double>, Matrix<double>, double,
                            double);

}  // namespace himo::cpu
