// Columns are reduced in panels. Within a panel A is not updated; its current value is
// A - V W^T - W V^T, where W comes from the products A v. Each column reads the upper half of the
// trailing matrix once, and each panel writes it once. By symmetry a row of the upper half is a
// column of the lower half, so all accesses run along rows.

#include "cpu/tridiagonal.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/dense.h"
#include "cpu/solver_loops.h"

namespace himo::cpu {
namespace {

constexpr int64_t kPanel = 16;       // columns reduced between two updates of the matrix
constexpr int64_t kUpdateRows = 48;  // rows of an update block; its lower triangle is wasted work
// Reflections applied at once: a larger block reads the vectors less often but costs more to form.
constexpr int64_t kWyBlock = 72;
int64_t wy_block(int64_t n) { return n < 512 ? 24 : kWyBlock; }
// Number of remaining columns below which a second thread costs more than it saves: in one product
// A v, and in the whole back-transformation.
constexpr int64_t kForkSide = 256;
constexpr int64_t kBackForkSide = 128;
constexpr int64_t kCopyGrain = 32768;  // minimum number of entries one thread copies

// Returns the factor of the reflection that zeroes x[j + 1:] except its first entry, which becomes
// the off-diagonal entry of T. Overwrites x with v, which is 0 up to j and 1 at j + 1. Entries
// whose squares could underflow are treated as 0, since the entries of the matrix are of order 1.
double reflect(const SolverLoops& loops, double* x, int64_t j, int64_t width,
               double& off_diagonal) {
  const int64_t from = round_down(j + 1);
  const double first = x[j + 1];
  std::fill(x + from, x + j + 2, 0.0);
  const double square = loops.dot(x, x, from, width);
  const bool reflects = square >= 1e-280;
  off_diagonal = reflects ? -std::copysign(std::sqrt(first * first + square), first) : first;
  loops.combine(reflects ? 1 / (first - off_diagonal) : 0, x, 0, x, from, width);
  x[j + 1] = 1;
  return reflects ? (off_diagonal - first) / off_diagonal : 0;
}

struct Reduction {
  const SolverLoops& loops;
  double* matrix;  // a copy, [width, stride]; rows and columns from n to width are 0
  int64_t width, stride, threads;
  double *v, *w, *v_again;  // [kPanel, stride] each, contiguous in this order
  double* products;         // [threads, stride]
  double dots[2 * kPanel];  // of V, then of W

  // products[0] = A v, dots = (V, W) . v
  void multiply(const double* x, int64_t j, int64_t count) {
    const int64_t from = round_down(j + 1), left = width - from;
    const int64_t tasks = left < kForkSide || at::in_parallel_region() ? 1 : threads;
    const int64_t groups = at::divup(count, 4), each = at::divup(2 * groups, tasks);
    // First row of a task, chosen so that all tasks cover equal areas of the triangle.
    const auto bound = [&](int64_t task) {
      const double share = std::sqrt(1 - static_cast<double>(task) / static_cast<double>(tasks));
      return task == tasks ? width : width - round_down(std::llround(share * left));
    };
    const auto work = [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = bound(task);
        double* out = products + task * stride;
        std::fill(out + first, out + width, 0.0);
        loops.multiply_symmetric(matrix, stride, first, bound(task + 1), width, x, out);
        for (int64_t group = task * each; group < std::min((task + 1) * each, 2 * groups);
             ++group) {
          const bool of_v = group < groups;
          const int64_t m = (of_v ? group : group - groups) * 4;
          loops.dot_rows((of_v ? v : w) + m * stride, stride, from, width, x,
                         dots + (of_v ? 0 : kPanel) + m);
        }
      }
    };
    if (tasks == 1) return work(0, 1);
    at::parallel_for(0, tasks, 1, work);
    for (int64_t task = 1; task < tasks; ++task) {
      loops.add(products, products + task * stride, bound(task), width);
    }
  }

  // Reduces `count` columns, starting at `first`.
  void reduce_panel(int64_t first, int64_t count, double* diagonal, double* off_diagonal,
                    double* factors) {
    double v_next[kPanel], w_next[kPanel];
    const double* top = matrix + first * stride;
    std::copy(top + round_down(first), top + width, v + round_down(first));
    for (int64_t l = 0; l < count; ++l) {
      const int64_t j = first + l, from = round_down(j + 1);
      double *x = v + l * stride, *product = w + l * stride;
      diagonal[j] = x[j];
      const double factor = reflect(loops, x, j, width, off_diagonal[j]);
      factors[j] = factor;
      multiply(x, j, l);
      std::copy(products + from, products + width, product + from);
      double* next = l + 1 < kPanel ? v + (l + 1) * stride : products;
      const double* row = matrix + (j + 1) * stride;
      std::copy(row + from, row + width, next + from);
      for (int64_t m = 0; m < l; ++m) {
        v_next[m] = v[m * stride + j + 1];
        w_next[m] = w[m * stride + j + 1];
      }
      loops.subtract_rows({v, w, stride, l, dots + kPanel, dots, w_next, v_next, product, next},
                          from, width);
      const double along = loops.dot(product, x, from, width);
      loops.combine(factor, product, -0.5 * factor * factor * along, x, from, width);
      std::fill(product + round_down(first), product + j + 1, 0.0);
      loops.combine(1, next, -product[j + 1], x, from, width);
      loops.combine(1, next, -1, product, from, width);
      diagonal[j + 1] = next[j + 1];  // final after the last column
    }
  }

  // A -= V W^T + W V^T from row `first` on, in blocks that cover the upper half.
  void update(int64_t first) {
    std::copy(v, v + kPanel * stride, v_again);
    const Matrix<const double> left{v, 2 * kPanel, width, stride, 1};
    const Matrix<const double> right{w, 2 * kPanel, width, stride, 1};
    const int64_t blocks = at::divup(width - first, kUpdateRows), pairs = at::divup(blocks, 2);
    const auto update_block = [&](int64_t block) {
      const int64_t i = first + block * kUpdateRows, rows = std::min(kUpdateRows, width - i);
      himo::cpu::multiply(left.column_block(i, rows).t(), right.column_block(i, width - i),
                          {matrix + i * stride + i, rows, width - i, stride, 1}, -1, 1);
    };
    // A task is a long and a short block of rows, which balances the load.
    const int64_t grain = width - first < kForkSide ? pairs : 1;
    at::parallel_for(0, pairs, grain, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        update_block(task);
        if (blocks - 1 - task != task) update_block(blocks - 1 - task);
      }
    });
  }
};

// Computes triangle = T^T of the compact form H_0 H_1 ... = I - V^T T V, v_j in rows, from
// gram = V V^T, one reflection at a time (Schreiber and Van Loan, SIAM J. Sci. Stat. Comput. 10,
// 1989).
void wy_triangle(const double* factors, int64_t count, const double* gram, double* triangle) {
  std::fill(triangle, triangle + count * count, 0.0);
  for (int64_t i = 0; i < count; ++i) {
    double* row = triangle + i * count;
    for (int64_t k = 0; k < i; ++k) {
      const double weight = -factors[i] * gram[i * count + k];
      const double* above = triangle + k * count;
      for (int64_t m = 0; m <= k; ++m) row[m] += weight * above[m];
    }
    row[i] = factors[i];
  }
}

}  // namespace

int64_t tridiagonalise_work(int64_t n) {
  return solver_stride(n) * (round_up(n) + 3 * kPanel + at::get_num_threads());
}

void tridiagonalise(double* matrix, int64_t n, double scale, double* diagonal, double* off_diagonal,
                    double* factors, double* work) {
  const int64_t width = round_up(n), stride = solver_stride(n);
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  double* v = work + width * stride;
  double* w = v + kPanel * stride;
  double* again = w + kPanel * stride;
  Reduction reduction{solver_loops(),          work, width, stride, threads, v, w, again,
                      again + kPanel * stride, {}};
  std::fill(v, again, 0.0);
  at::parallel_for(0, width, at::divup(kCopyGrain, n), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      double* row = work + i * stride;
      const int64_t from = round_down(i);
      // Update blocks reach up to kUpdateRows left of the diagonal: zero the entries there, so that
      // they do not compute with uninitialised memory.
      std::fill(row + std::max<int64_t>(0, from - kUpdateRows), row + width, 0.0);
      if (i >= n) continue;
      for (int64_t k = from; k < i; ++k) row[k] = scale * matrix[k * n + i];
      for (int64_t k = i; k < n; ++k) row[k] = scale * matrix[i * n + k];
    }
  });
  for (int64_t first = 0; first + 1 < n; first += kPanel) {
    const int64_t count = std::min(kPanel, n - 1 - first);
    reduction.reduce_panel(first, count, diagonal, off_diagonal, factors);
    for (int64_t l = 0; l < count; ++l) {
      double* row = matrix + (first + l) * n;
      std::fill(row, row + first + l + 1, 0.0);
      std::copy(v + l * stride + first + l + 1, v + l * stride + n, row + first + l + 1);
    }
    if (first + count + 1 < n) reduction.update(first + count);
  }
}

int64_t back_transform_work(int64_t n) { return n * (solver_stride(n) + kWyBlock); }

void back_transform(const double* reflections, const double* factors, int64_t n, double* rows,
                    int64_t stride, double* work) {
  const int64_t size = wy_block(n), blocks = at::divup(n - 1, size);
  const int64_t work_stride = solver_stride(n);
  double* combined = work;
  double* products = work + n * work_stride;  // [n, size]
  // The product of `count` reflections is I - V^T T V. v holds V from its first nonzero column,
  // `column`, and combined holds T^T V.
  struct Block {
    int64_t count, column, columns;
    Matrix<const double> v;
    Matrix<double> combined;
  };
  const auto block_at = [&](int64_t block) {
    const int64_t first = block * size, count = std::min(size, n - 1 - first);
    const int64_t column = first + 1, columns = n - column;
    return Block{count,
                 column,
                 columns,
                 {reflections + first * n + column, count, columns, n, 1},
                 {combined + first * work_stride + column, count, columns, work_stride, 1}};
  };
  const auto combine_block = [&](int64_t index) {
    const Block block = block_at(index);
    std::vector<double> memory(2 * block.count * block.count);  // too large for thread stacks
    const auto gram = row_major(memory.data(), block.count, block.count);
    const auto triangle = row_major(&memory[block.count * block.count], block.count, block.count);
    multiply(block.v, block.v.t(), gram);
    wy_triangle(factors + index * size, block.count, gram.data, triangle.data);
    multiply(triangle, block.v, block.combined);
  };
  const int64_t pairs = at::divup(blocks, 2), grain = n < kBackForkSide ? blocks : 1;
  at::parallel_for(0, pairs, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {  // a long and a short block
      combine_block(task);
      if (blocks - 1 - task != task) combine_block(blocks - 1 - task);
    }
  });
  const int64_t tasks = n < kBackForkSide || at::in_parallel_region() ? 1 : at::get_num_threads();
  const int64_t each = round_up(at::divup(n, tasks));
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * each, count = std::min(n, end * each) - first;
    if (count <= 0) return;
    for (int64_t index = blocks - 1; index >= 0; --index) {
      const Block block = block_at(index);
      const Matrix<double> part{rows + first * stride + block.column, count, block.columns, stride,
                                1};
      const auto product = row_major(products + first * size, count, block.count);
      multiply(part, block.v.t(), product);
      multiply(product, block.combined, part, -1, 1);
    }
  });
}

}  // namespace himo::cpu
