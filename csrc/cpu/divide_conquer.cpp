// A rank-one change in the middle cuts T in two (Cuppen, Numer. Math. 36, 1981). Given the
// eigenvalues and vectors of the halves, the eigenpairs of T follow from diag(d) + rho z z^T. Pairs
// that are already correct to rounding are excluded, "deflated" (Dongarra and Sorensen, SIAM J.
// Sci. Stat. Comput. 8, 1987). Vectors are stored as rows, so that all accesses are contiguous.

#include "cpu/divide_conquer.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "cpu/dense.h"
#include "cpu/secular.h"
#include "cpu/solver_loops.h"
#include "cpu/tridiagonal.h"

namespace himo::cpu {
namespace {

constexpr double kEps = std::numeric_limits<double>::epsilon() / 2;
constexpr int64_t kLeaf = 24;          // solved by QR sweeps
constexpr int64_t kForkSide = 128;     // with fewer rows a second thread does not pay off
constexpr int64_t kCopyGrain = 32768;  // minimum number of entries one thread copies
constexpr int kSweeps = 30;            // limit per eigenvalue; 2 are usual
constexpr double kFloor = 1e-32;       // smaller differences are 0; entries are of order 1

// Diagonalises by QR sweeps with Wilkinson's shift (Golub and Van Loan, section 8.3) and applies
// their rotations to the rows. Returns whether all of e became negligible within kSweeps.
bool solve_by_sweeps(double* d, double* e, int64_t n, double* rows, int64_t stride) {
  const auto negligible = [&](int64_t k) {
    return std::abs(e[k]) <= kEps * (std::abs(d[k]) + std::abs(d[k + 1])) ||
           std::abs(e[k]) < kFloor * kEps;
  };
  int64_t sweeps = 0;
  for (int64_t last = n - 1; last > 0;) {
    if (negligible(last - 1)) {
      --last;
      continue;
    }
    if (++sweeps > kSweeps * n) return false;
    int64_t first = last - 1;
    while (first > 0 && !negligible(first - 1)) --first;
    const double half = (d[last - 1] - d[last]) / 2, off = e[last - 1];
    const double shift =
        d[last] - off * off / (half + std::copysign(std::sqrt(half * half + off * off), half));
    double x = d[first] - shift, y = e[first];
    for (int64_t k = first; k < last; ++k) {
      const double length = std::sqrt(x * x + y * y);
      const double c = length > 0 ? x / length : 1, s = length > 0 ? y / length : 0;
      solver_loops().rotate(rows + k * stride, rows + (k + 1) * stride, n, c, s);
      if (k > first) e[k - 1] = length;
      const double change = s * (2 * c * e[k] + s * (d[k + 1] - d[k]));
      const double below = e[k];
      e[k] = c * s * (d[k + 1] - d[k]) + (c - s) * (c + s) * below;
      d[k] += change;
      d[k + 1] -= change;
      if (k + 1 < last) {
        x = e[k];
        y = s * e[k + 1];
        e[k + 1] *= c;
      }
    }
  }
  return true;
}

// Rows and columns [first, first + count) of T, cut before row `middle`.
struct Segment {
  int64_t first, count;

  int64_t middle() const { return first + count / 2; }
  Segment upper() const { return {first, count / 2}; }
  Segment lower() const { return {middle(), count - count / 2}; }
};

// The half of the columns in which a vector is nonzero.
enum Half : int8_t { kUpper, kBoth, kLower };

// diag(d) + rho z z^T after deflation. Indices are rows of the segment.
struct Deflated {
  double rho, largest;            // largest = max(rho, max |d|)
  std::vector<double> z;          // |z| = 1
  std::vector<Half> half;         // for each row
  std::vector<int64_t> unsolved;  // still to be solved; d ascends by more than rounding
  std::vector<int64_t> solved;    // deflated; d ascends
};

struct Solver {
  double *d, *e;
  int64_t n, stride;
  double* rows;  // [n, stride], eigenvectors
  // Scratch, [n, stride] each: the vectors to merge, and the eigenvectors of diag(d) + rho z z^T. A
  // segment uses only its own rows.
  double *compact, *rotations;
  int64_t* sorted;  // [n]; the rows of a segment in ascending order of d

  double* block(Segment s) const { return rows + s.first * stride + s.first; }

  // T = diag(T1, T2) + |e| u u^T, where u is 1 in the row before the cut and sign(e) after it.
  void cut(Segment s) const {
    const double rho = std::abs(e[s.middle() - 1]);
    d[s.middle() - 1] -= rho;
    d[s.middle()] -= rho;
  }

  // Runs on the calling thread, except that products of a large segment use all threads. The
  // recursion ends because a segment of one row needs no sweep.
  void solve(Segment s) const {
    if (s.count <= kLeaf && solve_leaf(s)) return;
    cut(s);
    solve(s.upper());
    solve(s.lower());
    merge(s);
  }

  // Returns whether the sweeps converged; if not, T is unchanged.
  bool solve_leaf(Segment s) const {
    double diagonal[kLeaf], off_diagonal[kLeaf] = {};
    for (int64_t i = 0; i < s.count; ++i) {
      diagonal[i] = d[s.first + i];
      if (i + 1 < s.count) off_diagonal[i] = e[s.first + i];
      std::fill_n(rows + (s.first + i) * stride, n, 0.0);
      block(s)[i * stride + i] = 1;
    }
    if (!solve_by_sweeps(diagonal, off_diagonal, s.count, block(s), stride)) return false;
    std::copy_n(diagonal, s.count, d + s.first);
    int64_t* order = sorted + s.first;
    std::iota(order, order + s.count, 0);
    sort(s, order, order + s.count);
    return true;
  }

  void sort(Segment s, int64_t* begin, int64_t* end) const {
    const double* values = d + s.first;
    std::sort(begin, end, [&](int64_t a, int64_t b) {
      return values[a] < values[b] || (values[a] == values[b] && a < b);
    });
  }

  Deflated deflate(Segment s) const;
  void merge(Segment s) const;
};

Deflated Solver::deflate(Segment s) const {
  const int64_t upper = s.upper().count;
  const double off = e[s.middle() - 1], rho = 2 * std::abs(off);
  double* values = d + s.first;
  int64_t* order = sorted + s.first;
  Deflated result{rho, rho, std::vector<double>(s.count), std::vector<Half>(s.count), {}, {}};
  auto& z = result.z;
  auto& half = result.half;
  for (int64_t i = 0; i < s.count; ++i) {
    const bool above = i < upper;  // above the cut
    const double entry = block(s)[i * stride + (above ? upper - 1 : upper)];
    z[i] = (above || off >= 0 ? entry : -entry) * std::sqrt(0.5);
    half[i] = above ? kUpper : kLower;
    result.largest = std::max(result.largest, std::abs(values[i]));
  }
  std::vector<int64_t> merged(s.count);
  for (int64_t i = upper; i < s.count; ++i) order[i] += upper;
  std::merge(order, order + upper, order + upper, order + s.count, merged.begin(),
             [&](int64_t a, int64_t b) { return values[a] < values[b]; });

  // z couples the rows. An entry below the tolerance counts as 0. For two close values, a rotation
  // of their vectors makes one of the two entries 0.
  const double tolerance = std::max(8 * kEps * result.largest, kFloor);
  int64_t held = -1;
  for (const int64_t i : merged) {
    if (rho * std::abs(z[i]) <= tolerance) {
      result.solved.push_back(i);
      continue;
    }
    if (held >= 0) {
      const double length = std::hypot(z[i], z[held]), gap = values[i] - values[held];
      const double c = z[i] / length, sine = z[held] / length;
      if (std::abs(gap * c * sine) <= tolerance) {
        z[i] = length;
        if (half[i] != half[held]) half[i] = half[held] = kBoth;
        solver_loops().rotate(block(s) + held * stride, block(s) + i * stride, s.count, c, -sine);
        values[held] += gap * sine * sine;
        values[i] -= gap * sine * sine;
        result.solved.push_back(held);
      } else {
        result.unsolved.push_back(held);
      }
    }
    held = i;
  }
  if (held >= 0) result.unsolved.push_back(held);
  sort(s, result.solved.data(), result.solved.data() + result.solved.size());
  return result;
}

void Solver::merge(Segment s) const {
  const Deflated deflated = deflate(s);
  const int64_t upper = s.upper().count, lower = s.lower().count;
  const int64_t unsolved = deflated.unsolved.size(), solved = deflated.solved.size();
  double* values = d + s.first;

  // Group the unsolved rows by half, so that the product for each half of the columns skips the
  // rows that are 0 there.
  int64_t starts[4] = {};
  for (const int64_t i : deflated.unsolved) ++starts[deflated.half[i] + 1];
  for (int k = 0; k < 3; ++k) starts[k + 1] += starts[k];
  int64_t next[3] = {starts[0], starts[1], starts[2]};
  std::vector<int64_t> places(unsolved), sources(unsolved);
  std::vector<double> poles(round_up(unsolved), 4 * deflated.largest + 1), z(round_up(unsolved));
  for (int64_t k = 0; k < unsolved; ++k) {
    const int64_t i = deflated.unsolved[k], place = next[deflated.half[i]]++;
    places[k] = place;
    sources[place] = i;
    poles[place] = values[i];
    z[place] = deflated.z[i];
  }

  // This fills at most `count` rows of `compact`: each half keeps at most as many rows as it has,
  // and rows nonzero in both halves, which are stored twice, are at most as many as solved rows.
  const int64_t uppers = starts[2], lowers = unsolved - starts[1];
  double* upper_rows = compact + s.first * stride;    // [uppers, upper]
  double* lower_rows = upper_rows + uppers * upper;   // [lowers, lower]
  double* solved_rows = lower_rows + lowers * lower;  // [solved, count]
  const int64_t grain = at::divup(kCopyGrain, s.count);
  at::parallel_for(0, s.count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const double* row =
          block(s) + (k < unsolved ? sources[k] : deflated.solved[k - unsolved]) * stride;
      if (k >= unsolved) {
        std::copy_n(row, s.count, solved_rows + (k - unsolved) * s.count);
        continue;
      }
      if (k < uppers) std::copy_n(row, upper, upper_rows + k * upper);
      if (k >= starts[1]) std::copy_n(row + upper, lower, lower_rows + (k - starts[1]) * lower);
    }
  });

  std::vector<double> results(s.count), scratch(round_up(unsolved));
  if (unsolved > 0) {
    const int64_t rotation_stride = solver_stride(unsolved);
    const Matrix<double> rotation{rotations + s.first * stride, unsolved, unsolved, rotation_stride,
                                  1};
    solve_secular({unsolved, deflated.rho, poles.data(), z.data(), places.data()}, results.data(),
                  rotation.data, rotation_stride, scratch.data());
    const auto multiply = [&](int64_t from, Matrix<const double> right, int64_t column) {
      const Matrix<double> out{block(s) + column, unsolved, right.columns, stride, 1};
      if (right.rows > 0) {
        return himo::cpu::multiply(rotation.column_block(from, right.rows), right, out);
      }
      for (int64_t i = 0; i < unsolved; ++i) std::fill_n(out.data + i * stride, right.columns, 0.0);
    };
    multiply(0, row_major<const double>(upper_rows, uppers, upper), 0);
    multiply(starts[1], row_major<const double>(lower_rows, lowers, lower), upper);
  }
  at::parallel_for(0, solved, grain, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      std::copy_n(solved_rows + k * s.count, s.count, block(s) + (unsolved + k) * stride);
    }
  });
  for (int64_t k = 0; k < solved; ++k) results[unsolved + k] = values[deflated.solved[k]];
  std::copy(results.begin(), results.end(), values);
  std::vector<int64_t> order(s.count);
  std::iota(order.begin(), order.end(), 0);
  std::merge(order.begin(), order.begin() + unsolved, order.begin() + unsolved, order.end(),
             sorted + s.first, [&](int64_t a, int64_t b) { return values[a] < values[b]; });
}

}  // namespace

int64_t divide_conquer_work(int64_t n) { return 2 * n * solver_stride(n); }

void solve_tridiagonal(double* diagonal, double* off_diagonal, int64_t n, double* rows,
                       int64_t* sorted, double* work) {
  const int64_t stride = solver_stride(n);
  const Solver solver{diagonal, off_diagonal, n, stride, rows, work, work + n * stride, sorted};
  // Cut T into at least as many segments as threads. One thread solves a segment; all threads share
  // the merges above.
  const int64_t threads = at::in_parallel_region() || n < kForkSide ? 1 : at::get_num_threads();
  std::vector<Segment> segments{{0, n}};
  size_t level = 0;  // index of the first segment of the lowest level
  while (static_cast<int64_t>(segments.size() - level) < threads &&
         segments.back().count > 2 * kLeaf) {
    const size_t end = segments.size();
    for (; level < end; ++level) {
      const Segment s = segments[level];
      solver.cut(s);
      segments.push_back(s.upper());
      segments.push_back(s.lower());
    }
  }
  at::parallel_for(level, segments.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) solver.solve(segments[k]);
  });
  while (level > 0) solver.merge(segments[--level]);
}

}  // namespace himo::cpu
