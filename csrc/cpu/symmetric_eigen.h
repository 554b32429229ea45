// A symmetric eigensolver with AVX-512, used where multiplies_wide() is true: on processors where
// MKL (ATen's LAPACK) uses only 256-bit registers.
#pragma once

#include <cstdint>

namespace himo::cpu {

int64_t solve_symmetric_wide_work(int64_t n);

// As solve_symmetric of cpu/dense.h, for finite entries. Results are bitwise reproducible for a
// given number of threads.
void solve_symmetric_wide(double* matrix,       // [n, n], row-major
                          double* eigenvalues,  // [n], descending
                          int64_t n, double* work);

}  // namespace himo::cpu
