// Products of matrices with AVX-512, for processors on which MKL, ATen's BLAS, uses registers of
// half the width: those that are not Intel's.
#pragma once

#include "cpu/dense.h"

namespace himo::cpu {

// Returns whether this is such a processor, and ATen's CPU capability admits AVX-512.
bool multiplies_wide();

// out = alpha a b + beta out, with out by rows; T is float or double. Sums have one order whatever
// the number of threads; inside at::parallel_for it runs on the one thread it is called from.
template <typename T>
void multiply_wide(Matrix<const T> a, Matrix<const T> b, Matrix<T> out, T alpha, T beta);

}  // namespace himo::cpu
