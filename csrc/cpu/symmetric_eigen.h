// The symmetric eigenproblem with AVX-512, for processors on which MKL, ATen's LAPACK, uses
// registers of half the width: where multiplies_wide().
#pragma once

#include <cstdint>

namespace himo::cpu {

int64_t solve_symmetric_wide_work(int64_t n);

// solve_symmetric of cpu/dense.h, for finite entries. Results have the same bits whenever the
// number of threads is the same.
void solve_symmetric_wide(double* matrix,       // [n, n], row-major
                          double* eigenvalues,  // [n], descending
                          int64_t n, double* work);

}  // namespace himo::cpu
