// Matrix products with AVX-512 for processors that are not Intel's. MKL, which is ATen's BLAS, uses
// only half the register width there.
#pragma once

#include "cpu/dense.h"

namespace himo::cpu {

// Returns whether this is such a processor and ATen's CPU capability allows AVX-512.
bool multiplies_wide();

// out = alpha a b + beta out, with row-major out; T is float or double. The order of the sums does
// not depend on the number of threads. Inside at::parallel_for it runs on the calling thread only.
template <typename T>
void multiply_wide(Matrix<const T> a, Matrix<const T> b, Matrix<T> out, T alpha, T beta);

}  // namespace himo::cpu
