#include "cpu/pca_problem.h"

namespace himo::cpu {

template <typename T>
HIMO_WIDE void convert(const double* in, int64_t size, T* out) {
  for (int64_t i = 0; i < size; ++i) out[i] = static_cast<T>(in[i]);
}

template <typename T>
HIMO_WIDE void weigh_pairs(const double* eigenvalues, int64_t rank, double lambda_r, double gap_eps,
                           double scale, bool dropped, Matrix<T> products) {  // [n - k, k]
  const double* of_rows = eigenvalues + (dropped ? 0 : rank);
  const double* of_columns = eigenvalues + (dropped ? rank : 0);
  const double sign = dropped ? 1 / lambda_r : -1 / lambda_r;
  const double factor = scale / lambda_r * scale;
  for (int64_t i = 0; i < products.rows; ++i) {
    T* row = products.data + i * products.row_stride;
    for (int64_t j = 0; j < products.columns; ++j) {
      const double gap = (of_rows[i] - of_columns[j]) * sign;  // kept minus dropped
      row[j] =
          static_cast<T>(static_cast<double>(row[j]) * regularised_inverse(gap, gap_eps) * factor);
    }
  }
}

template void convert(const double*, int64_t, float*);
template void convert(const double*, int64_t, double*);
template void weigh_pairs(const double*, int64_t, double, double, double, bool, Matrix<float>);
template void weigh_pairs(const double*, int64_t, double, double, double, bool, Matrix<double>);

}  // namespace himo::cpu
