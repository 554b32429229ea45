// Each row is read twice, from memory and then from L1. Nothing is allocated, except one row per
// thread if the entries of x are not contiguous. A row is summed by one thread, so results do not
// depend on the number of threads.

#include "cpu/normalize_kernel.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <vector>

#include "cpu/centring.h"
#include "cpu/row_loops.h"

namespace himo::cpu {
namespace {

const auto& loops_of(const float*) { return row_loops().float32; }
const auto& loops_of(const double*) { return row_loops().float64; }
const auto& loops_of(const BFloat16Bits*) { return row_loops().bfloat16; }
const auto& loops_of(const HalfBits*) { return row_loops().float16; }

float* elements(float* data) { return data; }
double* elements(double* data) { return data; }
auto* elements(c10::BFloat16* data) { return reinterpret_cast<BFloat16Bits*>(data); }
auto* elements(c10::Half* data) { return reinterpret_cast<HalfBits*>(data); }

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

// Calls row_range(begin, end) on ranges of rows of x [*, N, D], in parallel if there are many.
template <typename function_t>
void over_rows(const at::Tensor& x, const function_t& row_range) {
  if (x.numel() == 0) return;
  at::parallel_for(0, x.numel() / x.size(-1), grain(x.size(-1)), row_range);
}

}  // namespace

void normalize_fwd(const at::Tensor& x,       // [*, N, D]
                   const at::Tensor& unit) {  // [*, N, D]
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "normalize_fwd", [&] {
    const auto* from = elements(const_cast<scalar_t*>(x.const_data_ptr<scalar_t>()));
    auto* const to = elements(unit.mutable_data_ptr<scalar_t>());
    const int64_t size = x.size(-1);
    over_rows(x, [&](int64_t begin, int64_t end) {
      Rows rows(x, from);
      for (int64_t i = begin; i < end; ++i) loops_of(from).normalize(rows(i), size, to + i * size);
    });
  });
}

void normalize_bwd(const at::Tensor& grad,      // [*, N, D]
                   const at::Tensor& x,         // [*, N, D]
                   const at::Tensor& grad_x) {  // [*, N, D]
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "normalize_bwd", [&] {
    const auto* from = elements(const_cast<scalar_t*>(x.const_data_ptr<scalar_t>()));
    const auto* incoming = elements(const_cast<scalar_t*>(grad.const_data_ptr<scalar_t>()));
    auto* const to = elements(grad_x.mutable_data_ptr<scalar_t>());
    const int64_t size = x.size(-1);
    over_rows(x, [&](int64_t begin, int64_t end) {
      Rows rows(x, from), grads(grad, incoming);
      for (int64_t i = begin; i < end; ++i) {
        loops_of(from).normalize_gradient(grads(i), rows(i), size, to + i * size);
      }
    });
  });
}

}  // namespace himo::cpu
