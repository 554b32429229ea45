// An output [N, D] of one problem, accumulated in T block by block and rounded once to its dtype.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <limits>

#include "cpu/pca_problem.h"

namespace himo::cpu {

template <typename T>
class Output {
 public:
  // Problem b of `tensor` [B, N, D], contiguous. If its dtype is T, accumulates in place, otherwise
  // in `scratch`.
  Output(const at::Tensor& tensor, int64_t b, const Sides& sides, Buffer<T>& scratch)
      : sides_(sides),
        dtype_(tensor.scalar_type()),
        features_(tensor.size(2)),
        data_(static_cast<char*>(tensor.mutable_data_ptr()) +
              b * tensor.size(1) * features_ * tensor.element_size()),
        scratch_(scratch) {}

  // Initialises the lines with the lines of `x`; returns them as [lines, n].
  Matrix<T> begin_at(const at::Tensor& x, int64_t b, int64_t line, int64_t lines) {
    open(line, lines);
    auto source = block_;
    source.b = b;
    copy_block(x, source, sums_, stride_);
    return view();
  }

  // Initialises every row with the mean [D].
  Matrix<T> begin_at(const double* mean, int64_t line, int64_t lines) {
    open(line, lines);
    parallel_rows([&](int64_t i) {
      for (int64_t j = 0; j < block_.columns; ++j) {
        sums_[i * stride_ + j] = static_cast<T>(mean[block_.column + j]);
      }
    });
    return view();
  }

  // Writes the lines of the last begin_at to the output.
  void end() {
    if (in_place()) return;
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype_, "output", [&] {
      scalar_t* out = static_cast<scalar_t*>(data_) + block_.row * features_ + block_.column;
      parallel_rows([&](int64_t i) {
        for (int64_t j = 0; j < block_.columns; ++j) {
          out[i * features_ + j] = static_cast<scalar_t>(sums_[i * stride_ + j]);
        }
      });
    });
  }

 private:
  bool in_place() const { return dtype_ == c10::CppTypeToScalarType<T>::value; }

  void open(int64_t line, int64_t lines) {
    block_ = sides_.block(0, line, lines);
    if (in_place()) {
      sums_ = static_cast<T*>(data_) + block_.row * features_ + block_.column;
      stride_ = features_;
    } else {
      sums_ = scratch_.get(block_.rows * block_.columns);
      stride_ = block_.columns;
    }
  }

  Matrix<T> view() const {
    const Matrix<T> natural{sums_, block_.rows, block_.columns, stride_, 1};
    return sides_.features ? natural : natural.t();
  }

  template <typename Body>
  void parallel_rows(const Body& body) const {
    at::parallel_for(0, block_.rows, grain(block_.columns), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(i);
    });
  }

  Sides sides_;
  at::ScalarType dtype_;
  int64_t features_;
  void* data_;
  Buffer<T>& scratch_;
  Block block_{};
  T* sums_ = nullptr;
  int64_t stride_ = 0;
};

// Fill problem b of `tensor` [B, N, D] with NaN or with the values of x.
inline void fill_nan(const at::Tensor& tensor, int64_t b) {
  tensor.select(0, b).fill_(std::numeric_limits<double>::quiet_NaN());
}

inline void copy_problem(const at::Tensor& x, const at::Tensor& tensor, int64_t b) {
  tensor.select(0, b).copy_(x.as_strided({x.size(-2), x.size(-1)}, {x.stride(-2), x.stride(-1)},
                                         x.storage_offset() + problem_offset(x, b)));
}

}  // namespace himo::cpu
