#include "cpu/tile_products.h"

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <cstring>
#include <limits>

#include "cpu/centring.h"
#include "cpu/tile_loops.h"

namespace himo::cpu {

bool multiplies_bfloat16() {
#if defined(__x86_64__) && defined(__GNUC__)
  static const bool multiplies =
      __builtin_cpu_supports("avx512bf16") && at::get_cpu_capability() == "AVX512";
  return multiplies;
#else
  return false;
#endif
}

namespace {

// Whether oneDNN's micro-kernel takes bfloat16: it needs AMX and torch.backends.mkldnn enabled.
bool multiplies_bfloat16_by_matrix() {
#ifdef CPUBLAS_BRGEMM_BF16BF16F32
  return multiplies_bfloat16() && at::native::cpublas::could_pack(at::kBFloat16);
#else
  return false;
#endif
}

}  // namespace

void ProductScope::release() {
#ifdef CPUBLAS_BRGEMM_BF16BF16F32
  if (multiplies_bfloat16()) at::native::cpublas::brgemm_release();
#endif
}

template <typename factor_t>
at::Tensor left_factor(const at::Tensor& matrix) {  // [M, K]
  return matrix.to(c10::CppTypeToScalarType<factor_t>::value).contiguous();
}

template <>
at::Tensor left_factor<c10::BFloat16>(const at::Tensor& matrix) {
  const int64_t inner = matrix.size(1);
  if (inner % 2 == 0) return matrix.to(at::kBFloat16).contiguous();
  return at::constant_pad_nd(matrix.to(at::kBFloat16), {0, 1});
}

template <>
RightFactor<double>::RightFactor(const at::Tensor& matrix)  // [K, N]
    : storage_(matrix.to(at::kDouble).contiguous()) {}

namespace {

// Rows a multiple of 4096 bytes apart map to few L1 sets and evict each other.
constexpr int64_t kAliasing = 4096 / sizeof(float);

// The micro-kernel reads a strip of a few columns once for every few rows of the left factor. A
// strip that fits L1 with its rows next to each other runs at the machine's rate. Under AVX2 panels
// of 256 columns reach 0.75 of it, and a row-major factor with aliasing rows half.
struct PanelLayout {
  int64_t width;          // columns of a copied panel
  int64_t most_uncopied;  // rows up to which a row-major factor is used as it is
};
PanelLayout panel_layout() {
  if (at::get_cpu_capability() == "AVX512") return {64, std::numeric_limits<int64_t>::max()};
  return {32, 256};
}

}  // namespace

template <>
RightFactor<float>::RightFactor(const at::Tensor& matrix) {
  const int64_t inner = matrix.size(0), columns = matrix.size(1);
  const auto source = matrix.to(at::kFloat);
  const auto layout = panel_layout();
  if (source.is_contiguous() && columns % kAliasing != 0 && inner <= layout.most_uncopied) {
    storage_ = source, width_ = panel_stride_ = kColumns, row_stride_ = columns;
    return;
  }
  // [ceil(N / width), K, width]; columns past N are not read.
  width_ = std::min(columns, layout.width);
  const int64_t panels = at::divup(columns, width_);
  storage_ = at::empty({panels, inner, width_}, source.options());
  panel_stride_ = inner * width_, row_stride_ = width_;
  const auto* from = source.const_data_ptr<float>();
  auto* to = storage_.mutable_data_ptr<float>();
  const int64_t down = source.stride(0), across = source.stride(1);
  if (across == 1) {  // whole rows: strips of them would be a new page of memory each
    at::parallel_for(0, inner, grain(columns), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        for (int64_t column = 0; column < columns; column += width_) {
          std::memcpy(to + column / width_ * panel_stride_ + row * width_,
                      from + row * down + column,
                      std::min(width_, columns - column) * sizeof(float));
        }
      }
    });
    return;
  }
  constexpr int64_t kBlock = 64;  // rows that fit L1 with a panel's columns
  const int64_t blocks = at::divup(inner, kBlock);
  at::parallel_for(0, panels * blocks, 8, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t column = task / blocks * width_, row = task % blocks * kBlock;
      const int64_t rows = std::min(kBlock, inner - row),
                    count = std::min(width_, columns - column);
      const float* block = from + row * down + column * across;
      float* out = to + task / blocks * panel_stride_ + row * width_;
      if (down == 1) {
        tile_loops().float32.transpose(block, across, count, rows, out, width_);
        continue;
      }
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < count; ++j) out[i * width_ + j] = block[i * down + j * across];
      }
    }
  });
}

template <>
RightFactor<c10::BFloat16>::RightFactor(const at::Tensor& matrix) {
#ifdef HIMO_X86_TILE_LOOPS
  auto source = matrix.to(at::kBFloat16);
  const int64_t inner = source.size(0), columns = source.size(1);
  // Pairs of a transposed matrix are next to each other: 32 bits that move together.
  const bool transposed = source.stride(0) == 1 && inner % 2 == 0 && source.stride(1) % 2 == 0 &&
                          reinterpret_cast<uintptr_t>(source.const_data_ptr()) % sizeof(float) == 0;
  if (!transposed && source.stride(1) != 1) source = source.contiguous();
  constexpr int64_t kPanel = avx512_bf16::kPanel, kBlock = 256;  // rows of a block: 16 KiB
  const int64_t panels = at::divup(columns, kPanel), blocks = at::divup(inner, kBlock);
  storage_ = at::empty({panels, at::divup(inner, 2), kPanel, 2}, source.options());
  const auto* from = reinterpret_cast<const uint16_t*>(source.const_data_ptr<c10::BFloat16>());
  auto* to = reinterpret_cast<uint16_t*>(storage_.mutable_data_ptr<c10::BFloat16>());
  const int64_t down = source.stride(0), across = source.stride(1), panel = storage_.stride(0);
  at::parallel_for(0, panels * blocks, 8, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t column = task % panels * kPanel, row = task / panels * kBlock;
      const int64_t rows = std::min(kBlock, inner - row);
      const int64_t count = std::min(kPanel, columns - column);
      const uint16_t* block = from + row * down + column * across;
      uint16_t* out = to + task % panels * panel + row * kPanel;
      if (!transposed) {
        avx512_bf16::interleave_rows(block, down, rows, count, out);
        continue;
      }
      if (count < kPanel) std::memset(out, 0, rows * kPanel * sizeof(uint16_t));
      tile_loops().float32.transpose(reinterpret_cast<const float*>(block), across / 2, count,
                                     rows / 2, reinterpret_cast<float*>(out), kPanel);
    }
  });
#else
  TORCH_INTERNAL_ASSERT(false, "bfloat16 products need AVX-512 BF16");
#endif
}

namespace {

// Fallback to ATen's product where there is no micro-kernel. It runs on one thread inside a
// parallel region.
template <typename factor_t>
void multiply_by_aten(const factor_t* left, int64_t left_stride, int64_t rows,
                      const at::Tensor& block,  // [inner, columns]
                      bool add, factor_t* product, int64_t product_stride) {
  const auto a = at::from_blob(const_cast<factor_t*>(left), {rows, block.size(0)}, {left_stride, 1},
                               block.options());
  at::from_blob(product, {rows, block.size(1)}, {product_stride, 1}, block.options())
      .addmm_(a, block, add ? 1 : 0);
}

}  // namespace

template <>
void RightFactor<double>::multiply(const double* left, int64_t left_stride, int64_t rows,
                                   int64_t row, int64_t inner, int64_t column, int64_t columns,
                                   bool add, double* product, int64_t product_stride) const {
  multiply_by_aten(left, left_stride, rows,
                   storage_.narrow(0, row, inner).narrow(1, column, columns), add, product,
                   product_stride);
}

// oneDNN's micro-kernel. It uses the widest registers that the processor has; MKL, which is ATen's
// BLAS, uses only half their width on processors that are not Intel's.
template <>
void RightFactor<float>::multiply(const float* left, int64_t left_stride, int64_t rows, int64_t row,
                                  int64_t inner, int64_t column, int64_t columns, bool add,
                                  float* product, int64_t product_stride) const {
  // Rows of a panel per micro-kernel call: 512 KiB stay in L2, and 1024 rows amortise the sums.
  const int64_t most = std::min<int64_t>(1024, (512 << 10) / sizeof(float) / width_);
  for (int64_t j = 0, count = 0; j < columns; j += count) {
    const int64_t panel = (column + j) / width_, first = (column + j) % width_;
    count = std::min(width_ - first, columns - j);
    const float* right =
        storage_.const_data_ptr<float>() + panel * panel_stride_ + row * row_stride_ + first;
#ifdef CPUBLAS_BRGEMM_F32F32F32
    for (int64_t k = 0; k < inner; k += most) {
      at::native::cpublas::brgemm(rows, count, std::min(most, inner - k), left_stride, row_stride_,
                                  product_stride, add || k > 0, left + k, right + k * row_stride_,
                                  product + j, /*is_vnni=*/false);
    }
    if (inner > 0) continue;
#endif
    const auto block = at::from_blob(const_cast<float*>(right), {inner, count}, {row_stride_, 1},
                                     storage_.options());
    multiply_by_aten(left, left_stride, rows, block, add, product + j, product_stride);
  }
}

template <>
void RightFactor<c10::BFloat16>::multiply(const c10::BFloat16* left, int64_t left_stride,
                                          int64_t rows, int64_t row, int64_t inner, int64_t column,
                                          int64_t columns, bool add, float* product,
                                          int64_t product_stride) const {
#if defined(__x86_64__) && defined(__GNUC__)
  constexpr int64_t kPanel = avx512_bf16::kPanel;
  const int64_t panel_stride = storage_.stride(0), pairs = at::divup(inner, 2);
#ifdef CPUBLAS_BRGEMM_BF16BF16F32
  if (pairs > 0 && multiplies_bfloat16_by_matrix()) {
    const auto* panel =
        storage_.const_data_ptr<c10::BFloat16>() + column / kPanel * panel_stride + row * kPanel;
    // If another thread has disabled mkldnn since the check above, brgemm throws before it writes.
    // The remaining columns are then multiplied by our own kernel.
    try {
      for (; columns > 0; columns -= kPanel, column += kPanel, product += kPanel) {
        at::native::cpublas::brgemm(rows, std::min(kPanel, columns), 2 * pairs, left_stride, kPanel,
                                    product_stride, add, left, panel, product, /*is_vnni=*/true);
        panel += panel_stride;
      }
      return;
    } catch (const c10::Error&) {
    }
  }
#endif
  const auto* panels = reinterpret_cast<const uint16_t*>(storage_.const_data_ptr<c10::BFloat16>()) +
                       column / kPanel * panel_stride + row * kPanel;
  avx512_bf16::multiply(reinterpret_cast<const uint16_t*>(left), left_stride, rows, panels,
                        panel_stride, pairs, columns, add, product, product_stride);
#else
  TORCH_INTERNAL_ASSERT(false, "bfloat16 products need AVX-512 BF16");
#endif
}

template at::Tensor left_factor<float>(const at::Tensor&);
template at::Tensor left_factor<double>(const at::Tensor&);
template class RightFactor<float>;
template class RightFactor<double>;
template class RightFactor<c10::BFloat16>;

}  // namespace himo::cpu
