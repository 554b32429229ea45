// Rows of features of any dtype and strides, as the loops of row_loops.h take them.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <vector>

#include "cpu/centring.h"
#include "cpu/row_loops.h"

namespace himo::cpu {

inline const auto& row_loops_of(const float*) { return row_loops().float32; }
inline const auto& row_loops_of(const double*) { return row_loops().float64; }
inline const auto& row_loops_of(const BFloat16Bits*) { return row_loops().bfloat16; }
inline const auto& row_loops_of(const HalfBits*) { return row_loops().float16; }

inline float* elements(float* data) { return data; }
inline double* elements(double* data) { return data; }
inline auto* elements(c10::BFloat16* data) { return reinterpret_cast<BFloat16Bits*>(data); }
inline auto* elements(c10::Half* data) { return reinterpret_cast<HalfBits*>(data); }

// Gives access to the rows of a tensor [*, N, D] as contiguous arrays, copying them if necessary.
template <typename element_t>
class Rows {
 public:
  Rows(const at::Tensor& x, const element_t* data)
      : x_(x), data_(data), samples_(x.size(-2)), size_(x.size(-1)), stride_(x.stride(-1)) {
    if (stride_ != 1) copy_.resize(size_);
  }

  // Valid until the next call.
  const element_t* operator()(int64_t row) {
    const element_t* first =
        data_ + problem_offset(x_, row / samples_) + row % samples_ * x_.stride(-2);
    if (stride_ == 1) return first;
    for (int64_t j = 0; j < size_; ++j) copy_[j] = first[j * stride_];
    return copy_.data();
  }

 private:
  const at::Tensor& x_;
  const element_t* data_;
  int64_t samples_, size_, stride_;
  std::vector<element_t> copy_;
};

}  // namespace himo::cpu
