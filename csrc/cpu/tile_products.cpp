#include "cpu/tile_products.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>

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

template <typename factor_t>
RightFactor<factor_t>::RightFactor(const at::Tensor& matrix)  // [K, N]
    : storage_(matrix.to(c10::CppTypeToScalarType<factor_t>::value).contiguous()) {}

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

// By ATen's own product, for what has no micro-kernel. Inside a parallel region it runs on one
// thread.
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

// oneDNN's micro-kernel. It uses the widest registers on every processor that has them, where MKL,
// ATen's BLAS, uses half of their width on those that are not Intel's.
template <>
void RightFactor<float>::multiply(const float* left, int64_t left_stride, int64_t rows, int64_t row,
                                  int64_t inner, int64_t column, int64_t columns, bool add,
                                  float* product, int64_t product_stride) const {
#ifdef CPUBLAS_BRGEMM_F32F32F32
  if (inner > 0) {
    const int64_t stride = storage_.size(1);
    const float* right = storage_.const_data_ptr<float>() + row * stride + column;
    for (int64_t j = 0; j < columns; j += kColumns) {
      at::native::cpublas::brgemm(rows, std::min(kColumns, columns - j), inner, left_stride, stride,
                                  product_stride, add, left, right + j, product + j,
                                  /*is_vnni=*/false);
    }
    return;
  }
#endif
  multiply_by_aten(left, left_stride, rows,
                   storage_.narrow(0, row, inner).narrow(1, column, columns), add, product,
                   product_stride);
}

template <>
void RightFactor<c10::BFloat16>::multiply(const c10::BFloat16* left, int64_t left_stride,
                                          int64_t rows, int64_t row, int64_t inner, int64_t column,
                                          int64_t columns, bool add, float* product,
                                          int64_t product_stride) const {
#if defined(__x86_64__) && defined(__GNUC__)
  constexpr int64_t kPanel = avx512_bf16::kPanel;
  const int64_t panel_stride = storage_.stride(0);
  const auto* panels = reinterpret_cast<const uint16_t*>(storage_.const_data_ptr<c10::BFloat16>()) +
                       column / kPanel * panel_stride + row * kPanel;
  avx512_bf16::multiply(reinterpret_cast<const uint16_t*>(left), left_stride, rows, panels,
                        panel_stride, at::divup(inner, 2), columns, add, product, product_stride);
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
