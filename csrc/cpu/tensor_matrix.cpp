#include "cpu/tensor_matrix.h"

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>

namespace himo::cpu {

void multiply(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out, double alpha,
              double beta) {
  AT_DISPATCH_FLOATING_TYPES(out.scalar_type(), "multiply", [&] {
    at::Tensor left, right;
    multiply(readable<scalar_t>(a, left), readable<scalar_t>(b, right), writable<scalar_t>(out),
             static_cast<scalar_t>(alpha), static_cast<scalar_t>(beta));
  });
}

template <typename T>
at::Tensor directions(const Spectrum& spectrum, int64_t from, int64_t count) {
  const auto out =
      at::empty({spectrum.n, count}, at::TensorOptions(c10::CppTypeToScalarType<T>::value));
  for (int64_t i = 0; i < spectrum.n; ++i) {
    convert(spectrum.eigenvectors + i * spectrum.n + from, count,
            out.mutable_data_ptr<T>() + i * count);
  }
  return out;
}

// Eight sums, so that the loop is vectorised.
template <typename T, typename other_t>
HIMO_WIDE double dot(const T* a, const other_t* b, int64_t size) {
  double sums[8] = {};
  int64_t k = 0;
  for (; k + 8 <= size; k += 8) {
    for (int64_t u = 0; u < 8; ++u) sums[u] += static_cast<double>(a[k + u]) * b[k + u];
  }
  for (; k < size; ++k) sums[0] += static_cast<double>(a[k]) * b[k];
  return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
}

template <typename T, typename sum_t>
HIMO_WIDE void add_multiple(double factor, const T* x, int64_t size, sum_t* out) {
  for (int64_t k = 0; k < size; ++k) {
    out[k] = static_cast<sum_t>(out[k] + factor * static_cast<double>(x[k]));
  }
}

template <typename T>
HIMO_WIDE void scale_row(const T* row, double factor, int64_t size, T* out) {
  for (int64_t k = 0; k < size; ++k) out[k] = static_cast<T>(row[k] * factor);
}

template at::Tensor directions<float>(const Spectrum&, int64_t, int64_t);
template double dot(const float*, const float*, int64_t);
template double dot(const float*, const double*, int64_t);
template void add_multiple(double, const float*, int64_t, float*);
template void scale_row(const float*, double, int64_t, float*);
template at::Tensor directions<double>(const Spectrum&, int64_t, int64_t);
template double dot(const double*, const double*, int64_t);
template void add_multiple(double, const double*, int64_t, double*);
template void scale_row(const double*, double, int64_t, double*);
template void add_multiple(double, const float*, int64_t, double*);
template void add_multiple(double, const double*, int64_t, float*);

}  // namespace himo::cpu
