// Runs the solver's CUDA kernel on the host: tests/emulate builds this with each sanitizer.
//
//   solve IN OUT [SEED]     SEED: of the order in which threads run
//
// IN holds int64 n, problems and whether there is a threshold; float64 threshold, relative,
// absolute; then float64 shifts [problems] and matrices [problems, n, n]. OUT receives float64
// eigenvalues and vectors, int64 rank and int32 certified. Results that are not written stay NaN,
// or -1.

#include <cstdio>
#include <limits>
#include <vector>

#include "cuda/symmetric_eigen.h"
#include "emulate/cuda_on_host.h"

namespace {

template <class T>
std::vector<T> read(std::FILE* file, size_t count) {
  std::vector<T> values(count);
  if (count > 0 && std::fread(values.data(), sizeof(T), count, file) != count)
    himo::emulate::fail("solve: the input ends early, expected %lu numbers\n", count);
  return values;
}

template <class T>
void write(std::FILE* file, const std::vector<T>& values) {
  if (!values.empty() &&
      std::fwrite(values.data(), sizeof(T), values.size(), file) != values.size())
    himo::emulate::fail("solve: cannot write %lu numbers\n", values.size());
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 3)
    himo::emulate::fail("solve: expected IN OUT [SEED], got %lu arguments\n", count - 1);
  if (count > 3) himo::emulate::order_seed = std::atoi(arguments[3]);
  std::FILE* in = std::fopen(arguments[1], "rb");
  std::FILE* out = std::fopen(arguments[2], "wb");
  if (!in || !out) himo::emulate::fail("solve: cannot open file %lu\n", in ? 2 : 1);
  const auto sizes = read<int64_t>(in, 3);
  const auto rule = read<double>(in, 3);
  const int n = static_cast<int>(sizes[0]);
  const size_t side = n > 0 ? n : 0;  // the launcher refuses others
  const size_t problems = sizes[1], elements = problems * side * side;
  const auto shifts = read<double>(in, problems);
  const auto matrices = read<double>(in, elements);
  const double nan = std::numeric_limits<double>::quiet_NaN();
  std::vector<double> eigenvalues(problems * side, nan), vectors(elements, nan);
  std::vector<double> work(problems * himo_cuda_symmetric_eigen_work(n), nan);
  std::vector<int64_t> rank(problems, -1);
  std::vector<int> certified(problems, -1);
  const int error =
      himo_cuda_symmetric_eigen(matrices.data(), eigenvalues.data(), vectors.data(), rank.data(),
                                certified.data(), work.data(), sizes[2] ? rule.data() : nullptr,
                                shifts.data(), rule[1], rule[2], problems, n, nullptr);
  if (error) himo::emulate::fail("solve: CUDA error %lu\n", error);
  write(out, eigenvalues);
  write(out, vectors);
  write(out, rank);
  write(out, certified);
  return std::fclose(in) | std::fclose(out);
}
