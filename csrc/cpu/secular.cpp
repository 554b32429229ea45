// An eigenvalue is a root of f(x) = 1 / rho + sum_j z_j^2 / (d_j - x), with one root between each
// two adjacent poles. A root is computed as its distance from the nearer pole, so that the
// differences d_j - x, which determine the vectors, keep full accuracy. f is split into the sums
// over the poles below and above x, each interpolated by one pole (Li, LAPACK Working Note 89,
// 1994). The vectors use the z for which the computed roots are exact: this makes them orthogonal
// (Gu and Eisenstat, SIAM J. Matrix Anal. Appl. 16, 1995).

#include "cpu/secular.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace himo::cpu {
namespace {

constexpr double kEps = std::numeric_limits<double>::epsilon() / 2;
constexpr int kSteps = 24;         // limit of interpolation steps; 3 or 4 are usual
constexpr int kBisections = 1200;  // limit of all steps; enough to bisect the range of a double
constexpr int64_t kGrain = 16384;  // with fewer divisions a second thread does not pay off

// f at some x, and its sums.
struct Sums : SecularSums {
  double value;

  double slope() const { return below_slope + above_slope; }

  // Returns whether f is 0 to within the rounding of its terms and of x.
  bool vanish(double rho, double shift) const {
    const double terms = 1 / rho + std::abs(below) + std::abs(above);
    return std::abs(value) <= kEps * (8 * terms + std::abs(shift) * slope());
  }
};

Sums evaluate(const Secular& problem, double origin, double shift, double split) {
  const auto sums = solver_loops().secular_sums(problem, origin, shift, split);
  return {sums, 1 / problem.rho + sums.below + sums.above};
}

// Returns the root of c y^2 - a y + b on the side of the interpolation's pole. If there is none it
// returns NaN or inf, which lies outside every bracket.
double interpolation_root(double a, double b, double c, bool last) {
  const double root = std::sqrt(std::abs(a * a - 4 * b * c));
  if (last) return a >= 0 ? (a + root) / (2 * c) : 2 * b / (a - root);
  return a <= 0 ? (a - root) / (2 * c) : 2 * b / (a + root);
}

// The bracket of a root, as distances from the pole at `origin`, and the two poles of the
// interpolation of f: the two adjacent to the root, or the last two for the last root.
struct Bracket {
  double left, right, left_square, right_square;  // poles, and their z^2
  bool last;
  double origin, low, high;

  // Returns the distance from `shift` to the root of the interpolation, which matches f and its
  // slope. With `fixed` the nearer pole keeps its own weight and one weight covers the rest;
  // otherwise the poles of each side share a weight. Falls back to a Newton step if the result has
  // the wrong sign.
  double step(const Sums& sums, double shift, bool fixed) const {
    const double p = (left - origin) - shift, q = (right - origin) - shift;
    const double slope = sums.slope(), value = sums.value;
    double c;
    if (fixed && !last) {
      c = origin == left ? value - q * slope - (p - q) * left_square / (p * p)
                         : value - p * slope - (q - p) * right_square / (q * q);
    } else {
      c = value - p * sums.below_slope - q * sums.above_slope;
    }
    const double a = (p + q) * value - p * q * slope, b = p * q * value;
    const double change = interpolation_root(a, b, last ? std::abs(c) : c, last);
    return change * value < 0 ? change : -value / slope;
  }
};

// Returns root i and writes d - root to `differences`.
double find_root(const Secular& problem, int64_t i, double* differences) {
  const auto square = [&](int64_t j) { return problem.z[j] * problem.z[j]; };
  const bool last = i == problem.count - 1;
  const int64_t own = problem.sorted[i];
  if (problem.count == 1) {
    const double shift = problem.rho * square(own);
    solver_loops().differences(problem, problem.d[own], shift, differences);
    return problem.d[own] + shift;
  }
  const int64_t l = last ? problem.sorted[i - 1] : own, r = last ? own : problem.sorted[i + 1];
  const double gap = problem.d[r] - problem.d[l];
  // The last root is at most rho |z|^2 above its pole, and |z| <= 1 up to rounding.
  const double reach = last ? problem.rho * (1 + 1e-9) : gap;
  Bracket bracket{problem.d[l], problem.d[r], square(l), square(r), last, problem.d[own], 0, reach};

  // The sign of f half way tells which pole is nearer. For the first guess, the sum of f without
  // the two poles is assumed to be the same at the root as half way.
  double shift = reach / 2;
  Sums sums = evaluate(problem, bracket.origin, shift, bracket.left);
  (sums.value < 0 ? bracket.low : bracket.high) = shift;
  const double p = bracket.left - bracket.origin - shift,
               q = bracket.right - bracket.origin - shift;
  const double rest = sums.value - square(l) / p - square(r) / q, squares = square(l) + square(r);
  double guess;
  if (last || sums.value < 0) {
    guess = interpolation_root(squares - rest * gap, -square(r) * gap, rest, last);
    if (!last) {
      bracket.origin = bracket.right;
      bracket.low = shift = shift - gap;
      bracket.high = 0;
    }
  } else {
    guess = interpolation_root(squares + rest * gap, square(l) * gap, rest, false);
  }

  bool fixed = true;
  double before = std::abs(sums.value);
  for (int step = 0; step < kBisections && !sums.vanish(problem.rho, shift); ++step) {
    if (!(guess > bracket.low && guess < bracket.high) || step >= kSteps) {
      guess = bracket.low + (bracket.high - bracket.low) / 2;
      if (guess <= bracket.low || guess >= bracket.high) break;  // low and high are adjacent
    }
    if (guess == shift) break;
    shift = guess;
    sums = evaluate(problem, bracket.origin, shift, bracket.left);
    (sums.value < 0 ? bracket.low : bracket.high) = shift;
    if (std::abs(sums.value) > 0.1 * before) fixed = !fixed;  // slow convergence
    before = std::abs(sums.value);
    guess = shift + bracket.step(sums, shift, fixed);
  }
  solver_loops().differences(problem, bracket.origin, shift, differences);
  return bracket.origin + shift;
}

// weights[from:to] = the z for which the roots are exact, up to a constant factor, by Loewner's
// formula z_j^2 = (root_j - d_j) prod_{i != j} (root_i - d_j) / (d_i - d_j).
void recover_weights(const Secular& problem, const double* rows, int64_t stride, int64_t from,
                     int64_t to, double* weights) {
  solver_loops().loewner_products(problem, rows, stride, from, to, weights);
  for (int64_t j = from; j < to; ++j) {
    weights[j] =
        j < problem.count ? std::copysign(std::sqrt(std::abs(weights[j])), problem.z[j]) : 0;
  }
}

}  // namespace

void solve_secular(const Secular& problem, double* eigenvalues, double* rows, int64_t stride,
                   double* weights) {
  const int64_t count = problem.count, width = round_up(count);
  const int64_t grain = at::divup(kGrain, width);
  at::parallel_for(0, count, at::divup(grain, 4), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      eigenvalues[i] = find_root(problem, i, rows + i * stride);
    }
  });
  at::parallel_for(0, width / kLanePadding, at::divup(grain, 2), [&](int64_t begin, int64_t end) {
    recover_weights(problem, rows, stride, begin * kLanePadding, end * kLanePadding, weights);
  });
  at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      solver_loops().make_vector(weights, width, rows + i * stride);
  });
}

}  // namespace himo::cpu
