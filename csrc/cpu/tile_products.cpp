#include "cpu/tile_products.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>

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

// Rows a multiple of 4096 bytes apart map to few L1 sets and evict each other.
constexpr int64_t kAliasing = 4096 / sizeof(float);

template <>
RightFactor<float>::RightFactor(const at::Tensor& matrix) {
  const int64_t inner = matrix.size(0), columns = matrix.size(1);
  const auto source = matrix.to(at::kFloat);
  if (source.is_contiguous() && columns % kAliasing != 0) {
    storage_ = source, panel_stride_ = kColumns, row_stride_ = columns;
    return;
  }
  // [ceil(N / 256), K, 256]; columns past N are not read.
  const int64_t panels = at::divup(columns, kColumns), width = std::min(columns, kColumns);
  storage_ = at::empty({panels, inner, width}, source.options());
  panel_stride_ = inner * width, row_stride_ = width;
  if (source.stride(0) == 1 && !source.is_contiguous()) {
    // The transpose of a row-major matrix [N, K]: copy it in blocks that fit L1, on all threads.
    constexpr int64_t kBlock = 64;
    const auto* from = source.const_data_ptr<float>();
    auto* to = storage_.mutable_data_ptr<float>();
    const int64_t stride = source.stride(1), blocks = at::divup(inner, kBlock);
    at::parallel_for(0, panels * blocks, 4, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t column = task / blocks * kColumns, row = task % blocks * kBlock;
        tile_loops().float32.transpose(
            from + column * stride + row, stride, std::min(width, columns - column),
            std::min(kBlock, inner - row), to + task / blocks * panel_stride_ + row * width, width);
      }
    });
    return;
  }
  // On the calling thread, because ATen calls on workers would miss its grad and inference mode.
  for (int64_t panel = 0; panel < panels; ++panel) {
    const int64_t column = panel * kColumns, count = std::min(width, columns - column);
    storage_[panel].narrow(1, 0, count).copy_(source.narrow(1, column, count));
  }
}

template <>
RightFactor<c10::BFloat16>::RightFactor(const at::Tensor& matrix) {
  const auto source = matrix.to(at::kBFloat16);
  constexpr int64_t kPanel = avx512_bf16::kPanel;
  const int64_t inner = source.size(0), columns = source.size(1);
  const int64_t pairs = at::divup(inner, 2), panels = at::divup(columns, kPanel);
  storage_ = at::empty({panels, pairs, kPanel, 2}, source.options());
  const auto* from = reinterpret_cast<const uint16_t*>(source.const_data_ptr<c10::BFloat16>());
  auto* to = reinterpret_cast<uint16_t*>(storage_.mutable_data_ptr<c10::BFloat16>());
  const int64_t row_stride = source.stride(0), column_stride = source.stride(1);
  at::parallel_for(0, panels * pairs, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t column = task / pairs * kPanel, row = task % pairs * 2;
      uint16_t* out = to + task * kPanel * 2;
      for (int64_t k = 0; k < kPanel; ++k) {
        const bool inside = column + k < columns;
        const uint16_t* value = from + row * row_stride + (column + k) * column_stride;
        out[2 * k] = inside ? value[0] : 0;
        out[2 * k + 1] = inside && row + 1 < inner ? value[row_stride] : 0;
      }
    }
  });
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
  // Rows of a panel per micro-kernel call: 512 KiB, which stay in L2.
  constexpr int64_t kInner = 512;
  for (int64_t j = 0; j < columns; j += kColumns) {
    const int64_t panel = (column + j) / kColumns, first = (column + j) % kColumns;
    const int64_t count = std::min(kColumns, columns - j);
    const float* right =
        storage_.const_data_ptr<float>() + panel * panel_stride_ + row * row_stride_ + first;
#ifdef CPUBLAS_BRGEMM_F32F32F32
    for (int64_t k = 0; k < inner; k += kInner) {
      at::native::cpublas::brgemm(rows, count, std::min(kInner, inner - k), left_stride,
                                  row_stride_, product_stride, add || k > 0, left + k,
                                  right + k * row_stride_, product + j, /*is_vnni=*/false);
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
