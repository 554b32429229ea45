// The loop of the sigmoid loss over a tile; tile_loops_body.h includes this file.

// log(1 + e) for 0 <= e <= 1: 2 artanh z with z = e / (2 + e) <= 1 / 3. The series ends before the
// first term below one ulp.
template <typename acc_t>
HIMO_INLINE typename Lanes<acc_t>::type log_of_one_plus(typename Lanes<acc_t>::type e) {
  constexpr int kTerms = sizeof(acc_t) == 4 ? 7 : 16;
  const auto z = e / (e + acc_t{2}), square = z * z;
  auto series = fill<acc_t>(static_cast<acc_t>(1.0 / (2 * kTerms - 1)));
#pragma GCC unroll 16
  for (int k = kTerms - 2; k >= 0; --k) {
    series = series * square + static_cast<acc_t>(1.0 / (2 * k + 1));
  }
  return z * series * acc_t{2};
}

// With x = -z l, log(1 + exp(x)) and its derivative both follow from exp(-|x|), which cannot
// overflow.
template <typename acc_t>
SigmoidSums sigmoid(const SigmoidTile<acc_t>& tile) {
  using lanes_t = typename Lanes<acc_t>::type;
  constexpr int64_t step = Lanes<acc_t>::count;
  const int64_t width = padded(tile.columns), whole = tile.columns / step * step;
  SigmoidSums sums{0, 0, 0};
  for (int64_t i = 0; i < tile.rows; ++i) {
    const acc_t* products = tile.products + i * tile.products_stride;
    acc_t* part = tile.part == nullptr ? nullptr : tile.part + i * width;
    const int64_t positive = tile.diagonal + i;
    lanes_t loss{}, scale{}, bias{};
    // Adds one vector of columns from j on; `count` of them are inside the tile.
    const auto step_at = [&](int64_t j, lanes_t product, int64_t count) {
      lanes_t x = product * tile.scale + tile.bias;
      const bool has_positive = j <= positive && positive < j + step;
      if (has_positive) x[positive - j] = -x[positive - j];
      const lanes_t e = exponential<acc_t>(x > 0 ? -x : x);
      lanes_t softplus = (x > 0 ? x : lanes_t{}) + log_of_one_plus<acc_t>(e);
      for (int64_t k = count; k < step; ++k) softplus[k] = 0;
      loss += softplus;
      if (part == nullptr) return;
      const lanes_t share = acc_t{1} / (e + acc_t{1});
      lanes_t gradient = x > 0 ? share : e * share;
      if (has_positive) gradient[positive - j] = -gradient[positive - j];
      for (int64_t k = count; k < step; ++k) gradient[k] = 0;
      scale += gradient * product;
      bias += gradient;
      store<acc_t>(part + j, gradient * tile.factor);
    };
    for (int64_t j = 0; j < whole; j += step) step_at(j, load<acc_t>(products + j), step);
    for (int64_t j = whole; j < width; j += step) {  // the products are not padded
      const int64_t count = tile.columns > j ? tile.columns - j : 0;
      step_at(j, load_first<acc_t>(products + j, count), count);
    }
    sums.loss += static_cast<double>(total<acc_t>(loss));
    sums.scale += static_cast<double>(total<acc_t>(scale));
    sums.bias += static_cast<double>(total<acc_t>(bias));
  }
  return sums;
}
