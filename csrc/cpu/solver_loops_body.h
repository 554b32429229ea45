// The loops of solver_loops.h. Included once by each loops_<instruction set>.cpp; the rule in
// isa_lanes.h applies.

#include <cstdint>

#include "cpu/isa_lanes.h"
#include "cpu/solver_loops.h"

namespace himo::cpu::HIMO_ISA {
namespace {

using DoubleLanes = Lanes<double>::type;
constexpr int64_t kLanes = Lanes<double>::count;

HIMO_INLINE DoubleLanes magnitude(DoubleLanes value) { return larger(value, -value); }

double largest_magnitude(const double* values, int64_t count) {
  DoubleLanes even{}, odd{};
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    even = larger(magnitude(load(values + i)), even);
    odd = larger(magnitude(load(values + i + kLanes)), odd);
  }
  double result = largest<double>(larger(even, odd));
  for (; i < count; ++i) {
    const double value = values[i] < 0 ? -values[i] : values[i];
    result = value > result ? value : result;
  }
  return result;
}

double dot(const double* a, const double* b, int64_t from, int64_t width) {
  DoubleLanes sums{};
  for (int64_t k = from; k < width; k += kLanes) sums += load(a + k) * load(b + k);
  return total<double>(sums);
}

void add(double* out, const double* x, int64_t from, int64_t width) {
  for (int64_t k = from; k < width; k += kLanes) {
    store(out + k, load(out + k) + load(x + k));
  }
}

void combine(double a, double* out, double b, const double* x, int64_t from, int64_t width) {
  for (int64_t k = from; k < width; k += kLanes) {
    store(out + k, a * load(out + k) + b * load(x + k));
  }
}

void dot_rows(const double* rows, int64_t stride, int64_t from, int64_t width, const double* x,
              double* out) {
  DoubleLanes sums[4] = {};
  for (int64_t k = from; k < width; k += kLanes) {
    const DoubleLanes right = load(x + k);
#pragma GCC unroll 4
    for (int64_t r = 0; r < 4; ++r) sums[r] += right * load(rows + r * stride + k);
  }
  for (int64_t r = 0; r < 4; ++r) out[r] = total<double>(sums[r]);
}

// A strip of as many rows as a register has lanes: its square on the diagonal is one register wide.
void multiply_symmetric(const double* matrix, int64_t stride, int64_t from, int64_t to,
                        int64_t width, const double* x, double* out) {
  for (int64_t i = from; i < to; i += kLanes) {
    const double* rows = matrix + i * stride;
    DoubleLanes sums[kLanes] = {}, own = load(out + i);
#pragma GCC unroll 8
    for (int64_t r = 0; r < kLanes; ++r) own += x[i + r] * load(rows + r * stride + i);
    store(out + i, own);
    for (int64_t k = i + kLanes; k < width; k += kLanes) {
      const DoubleLanes right = load(x + k);
      DoubleLanes below = load(out + k), more{};  // two chains of additions
#pragma GCC unroll 8
      for (int64_t r = 0; r < kLanes; ++r) {
        const DoubleLanes entries = load(rows + r * stride + k);
        sums[r] += entries * right;
        (r % 2 ? more : below) += x[i + r] * entries;
      }
      store(out + k, below + more);
    }
#pragma GCC unroll 8
    for (int64_t r = 0; r < kLanes; ++r) out[i + r] += total<double>(sums[r]);
  }
}

template <int vectors>
HIMO_INLINE void subtract_at(const Pass& pass, int64_t k) {
  DoubleLanes product[vectors], next[vectors];
  for (int i = 0; i < vectors; ++i) {
    product[i] = load(pass.product + k + i * kLanes);
    next[i] = load(pass.next + k + i * kLanes);
  }
  for (int64_t m = 0; m < pass.count; ++m) {
#pragma GCC unroll 4
    for (int i = 0; i < vectors; ++i) {
      const DoubleLanes v = load(pass.v + m * pass.stride + k + i * kLanes);
      const DoubleLanes w = load(pass.w + m * pass.stride + k + i * kLanes);
      product[i] -= pass.v_of_product[m] * v;
      next[i] -= pass.v_of_next[m] * v;
      product[i] -= pass.w_of_product[m] * w;
      next[i] -= pass.w_of_next[m] * w;
    }
  }
  for (int i = 0; i < vectors; ++i) {
    store(pass.product + k + i * kLanes, product[i]);
    store(pass.next + k + i * kLanes, next[i]);
  }
}

void subtract_rows(const Pass& pass, int64_t from, int64_t width) {
  int64_t k = from;
  for (; k + 4 * kLanes <= width; k += 4 * kLanes) subtract_at<4>(pass, k);
  for (; k < width; k += kLanes) subtract_at<1>(pass, k);
}

void rotate(double* a, double* b, int64_t n, double c, double s) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const DoubleLanes x = load(a + i), y = load(b + i);
    store(a + i, c * x + s * y);
    store(b + i, c * y - s * x);
  }
  for (; i < n; ++i) {
    const double x = a[i], y = b[i];
    a[i] = c * x + s * y;
    b[i] = c * y - s * x;
  }
}

struct PartialSums {
  DoubleLanes below, above, below_slope, above_slope;
};

// Adds the terms of the poles from j on, one register of them.
HIMO_INLINE void add_terms(const Secular& problem, int64_t j, double origin, double shift,
                           double split, PartialSums& sums) {
  const DoubleLanes d = load(problem.d + j), z = load(problem.z + j), none{};
  const DoubleLanes quotient = z / ((d - origin) - shift);
  const DoubleLanes term = z * quotient, slope = quotient * quotient;
  sums.below += d <= split ? term : none;
  sums.above += d <= split ? none : term;
  sums.below_slope += d <= split ? slope : none;
  sums.above_slope += d <= split ? none : slope;
}

SecularSums secular_sums(const Secular& problem, double origin, double shift, double split) {
  PartialSums even{}, odd{};
  const int64_t width = round_up(problem.count);
  int64_t j = 0;
  for (; j + 2 * kLanes <= width; j += 2 * kLanes) {
    add_terms(problem, j, origin, shift, split, even);
    add_terms(problem, j + kLanes, origin, shift, split, odd);
  }
  if (j < width) add_terms(problem, j, origin, shift, split, even);
  return {total<double>(even.below + odd.below), total<double>(even.above + odd.above),
          total<double>(even.below_slope + odd.below_slope),
          total<double>(even.above_slope + odd.above_slope)};
}

void differences(const Secular& problem, double origin, double shift, double* differences) {
  const int64_t width = round_up(problem.count);
  for (int64_t j = 0; j < width; j += kLanes) {
    store(differences + j, (load(problem.d + j) - origin) - shift);
  }
}

// d - pole, or 1 where d is the pole itself.
HIMO_INLINE DoubleLanes distance(DoubleLanes d, double pole) {
  const DoubleLanes value = d - pole;
  return value == 0.0 ? fill(1.0) : value;
}

void loewner_products(const Secular& problem, const double* rows, int64_t stride, int64_t from,
                      int64_t to, double* weights) {
  for (int64_t j = from; j < to; j += kLanes) {
    const DoubleLanes d = load(problem.d + j);
    DoubleLanes product = fill(1.0);
    const auto* poles = problem.sorted;
    int64_t i = 0;
    for (; i + 4 <= problem.count; i += 4) {  // four factors per division; see secular.h
      const double* row = rows + i * stride + j;
      const DoubleLanes above =
          (load(row) * load(row + stride)) * (load(row + 2 * stride) * load(row + 3 * stride));
      const DoubleLanes below =
          (distance(d, problem.d[poles[i]]) * distance(d, problem.d[poles[i + 1]])) *
          (distance(d, problem.d[poles[i + 2]]) * distance(d, problem.d[poles[i + 3]]));
      product *= above / below;
    }
    for (; i < problem.count; ++i) {
      product *= load(rows + i * stride + j) / distance(d, problem.d[poles[i]]);
    }
    store(weights + j, product);
  }
}

void make_vector(const double* weights, int64_t width, double* row) {
  DoubleLanes sums{};
  for (int64_t j = 0; j < width; j += kLanes) {
    const DoubleLanes entries = load(weights + j) / load(row + j);
    store(row + j, entries);
    sums += entries * entries;
  }
  const double factor = 1 / __builtin_sqrt(total<double>(sums));
  for (int64_t j = 0; j < width; j += kLanes) store(row + j, factor * load(row + j));
}

void interleave(const double* const* columns, int64_t n, double* out, int64_t out_stride) {
  for (int64_t i = 0; i < n; ++i) {
    double line[kLanePadding];
    for (int64_t k = 0; k < kLanePadding; ++k) line[k] = columns[k][i];
    for (int64_t k = 0; k < kLanePadding; k += kLanes) {
      store(out + i * out_stride + k, load(line + k));
    }
  }
}

}  // namespace

extern const SolverLoops solver_loops;
const SolverLoops solver_loops{
    largest_magnitude,  dot,           add,        combine,      dot_rows,
    multiply_symmetric, subtract_rows, rotate,     secular_sums, differences,
    loewner_products,   make_vector,   interleave,
};

}  // namespace himo::cpu::HIMO_ISA
