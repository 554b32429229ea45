#include "pca.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/GradMode.h>

#include "common/check.h"
#include "common/shapes.h"
#include "covariance.h"
#include "cpu/pca_kernel.h"
#include "cpu/pca_problem.h"
#include "cpu/problems.h"
#include "cpu/symmetric_eigen.h"

namespace himo {
namespace {

int64_t small_side(const at::Tensor& x) { return std::min(x.size(-1), x.size(-2)); }

void check_x(const char* op, const at::Tensor& x) {
  check_features(op, "x", x);
  HIMO_CHECK_SHAPE(x.size(-1) > 0 && x.size(-2) > 0, op, "x", x,
                   "[*, N, D] with at least one row and one column");
}

// Checks shape and dtype of an argument; returns it contiguous, as [B, tail...].
at::Tensor flat(const char* op, const char* name, const at::Tensor& tensor, const at::Tensor& x,
                std::initializer_list<int64_t> tail, at::ScalarType dtype = at::kDouble) {
  HIMO_CHECK_CPU(op, name, tensor);
  const auto shape = with_tail(x, tail);
  HIMO_CHECK_SHAPE(tensor.sizes().equals(shape), op, name, tensor, at::IntArrayRef(shape));
  HIMO_CHECK_DTYPE(tensor.scalar_type() == dtype, op, name, dtype, tensor.scalar_type());
  return flatten_lead(tensor.resolve_neg(), static_cast<int64_t>(tail.size())).contiguous();
}

void check_grad(const char* op, const at::Tensor& grad, const at::Tensor& x) {
  check_features(op, "grad", grad);
  HIMO_CHECK_SHAPE(grad.sizes().equals(x.sizes()), op, "grad", grad, x.sizes());
}

Decomposition decompose(const char* op, const at::Tensor& x, double variance_threshold,
                        const Floor& floor) {
  check_x(op, x);
  const auto [mean, moment] =
      x.size(-1) <= x.size(-2) ? covariance_fwd(x, at::kDouble) : gram_fwd(x, at::kDouble);
  const auto eigenvalues = at::empty(with_tail(x, {small_side(x)}), mean.options());
  const auto rank = at::empty(with_tail(x, {}), mean.options().dtype(at::kLong));
  cpu::decompose(flatten_lead(moment, 2), flatten_lead(mean, 1), x.size(-2), variance_threshold,
                 floor, flatten_lead(eigenvalues, 1), flatten_lead(rank, 0));
  return {mean, eigenvalues, moment, rank};
}

void check_rows(const char* op, const at::Tensor& x) {
  check_x(op, x);
  HIMO_CHECK_SHAPE(x.dim() == 2, op, "x", x, "[M, D]");
}

Decomposition moment_decomposition(const at::Tensor& x, const at::Tensor& mean,
                                   const at::Tensor& eigenvalues, const at::Tensor& eigenvectors,
                                   const at::Tensor& rank) {
  const char* op = "pca_moment";
  check_rows(op, x);
  const int64_t features = x.size(1);
  return {flat(op, "mean", mean, x, {features}),
          flat(op, "eigenvalues", eigenvalues, x, {features}),
          flat(op, "eigenvectors", eigenvectors, x, {features, features}),
          flat(op, "rank", rank, x, {}, at::kLong)};
}

}  // namespace

Decomposition flat_decomposition(const char* op, const at::Tensor& x, const at::Tensor& mean,
                                 const at::Tensor& eigenvalues, const at::Tensor& eigenvectors,
                                 const at::Tensor& rank) {
  const int64_t n = small_side(x);
  return {flat(op, "mean", mean, x, {x.size(-1)}), flat(op, "eigenvalues", eigenvalues, x, {n}),
          flat(op, "eigenvectors", eigenvectors, x, {n, n}),
          flat(op, "rank", rank, x, {}, at::kLong)};
}

std::string eigensolver(int64_t n) {
  return cpu::fastest_eigensolver(n) == cpu::Eigensolver::kHimo ? "himo" : "lapack";
}

std::tuple<at::Tensor, at::Tensor> solve_symmetric(const at::Tensor& matrix,
                                                   const std::string& solver) {
  const char* op = "solve_symmetric";
  HIMO_CHECK_CPU(op, "matrix", matrix);
  HIMO_CHECK_SHAPE(matrix.dim() == 3 && matrix.size(1) == matrix.size(2) && matrix.size(1) >= 2, op,
                   "matrix", matrix, "[B, n, n] with n >= 2");
  HIMO_CHECK_DTYPE(matrix.scalar_type() == at::kDouble, op, "matrix", at::kDouble,
                   matrix.scalar_type());
  TORCH_CHECK_VALUE(solver == "himo" || solver == "lapack",
                    "solve_symmetric: solver must be \"himo\" or \"lapack\", got ", solver);
  const auto which = solver == "himo" ? cpu::Eigensolver::kHimo : cpu::Eigensolver::kLapack;
  const int64_t n = matrix.size(1);
  const auto vectors = matrix.clone(at::MemoryFormat::Contiguous);
  const auto values = at::empty({matrix.size(0), n}, matrix.options());
  const auto solve = [&](int64_t b, cpu::Buffer<double>& work) {
    cpu::solve_symmetric(vectors.mutable_data_ptr<double>() + b * n * n,
                         values.mutable_data_ptr<double>() + b * n, n,
                         work.get(cpu::solver_work(n, which)), which);
  };
  const auto cube = static_cast<double>(n * n * n);
  cpu::for_each_problem<cpu::Buffer<double>>(matrix.size(0), 10 * cube, solve);
  return {values, vectors};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> pca_decompose(
    const at::Tensor& x,  // [*, N, D]
    double variance_threshold, const Floor& floor) {
  const c10::NoGradGuard no_grad;
  const auto [mean, eigenvalues, eigenvectors, rank] =
      decompose("pca", x.resolve_neg(), variance_threshold, floor);
  return {mean, eigenvalues, eigenvectors, rank};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> pca_fwd(
    const at::Tensor& input,  // [*, N, D]
    double variance_threshold, const Floor& floor) {
  const c10::NoGradGuard no_grad;
  const auto x = input.resolve_neg();  // kernels read memory, which ignores a lazy negation
  const auto [mean, eigenvalues, eigenvectors, rank] =
      decompose("pca", x, variance_threshold, floor);
  const auto rows = at::empty(with_tail(x, {small_side(x), x.size(-1)}), mean.options());
  cpu::components(x, flatten_lead(mean, 1), flatten_lead(eigenvalues, 1),
                  flatten_lead(eigenvectors, 2), flatten_lead(rank, 0), flatten_lead(rows, 2));
  return {mean, eigenvalues, rows, rank, eigenvectors};
}

at::Tensor pca_bwd(const at::Tensor& grad_mean, const at::Tensor& grad_eigenvalues,
                   const at::Tensor& grad_components, const at::Tensor& x, const at::Tensor& mean,
                   const at::Tensor& eigenvalues, const at::Tensor& eigenvectors,
                   const at::Tensor& rank, double gap_eps) {
  const c10::NoGradGuard no_grad;
  check_x("pca", x);
  const int64_t n = small_side(x), features = x.size(-1);
  const auto saved = flat_decomposition("pca", x, mean, eigenvalues, eigenvectors, rank);
  const auto grad_x = at::empty(x.sizes(), x.options());
  cpu::pca_bwd(flat("pca", "grad_mean", grad_mean, x, {features}),
               flat("pca", "grad_eigenvalues", grad_eigenvalues, x, {n}),
               flat("pca", "grad_components", grad_components, x, {n, features}), x.resolve_neg(),
               saved.mean, saved.eigenvalues, saved.eigenvectors, saved.rank, gap_eps,
               flatten_lead(grad_x, 2));
  return grad_x;
}

at::Tensor project_reconstruct_fwd(const at::Tensor& x,           // [*, N, D]
                                   const at::Tensor& mean,        // [*, D]
                                   const at::Tensor& components,  // [*, K, D]
                                   const at::Tensor& rank) {      // [*]
  const char* op = "project_reconstruct";
  const c10::NoGradGuard no_grad;
  check_x(op, x);
  const auto dtype = mean.scalar_type();
  HIMO_CHECK_DTYPE(is_computing_dtype(dtype), op, "mean", "float32 or float64", dtype);
  HIMO_CHECK_SHAPE(components.dim() >= 2, op, "components", components, "[*, K, D]");
  const auto reconstruction = at::empty(x.sizes(), x.options());
  cpu::project_reconstruct_fwd(
      x.resolve_neg(), flat(op, "mean", mean, x, {x.size(-1)}, dtype),
      flat(op, "components", components, x, {components.size(-2), x.size(-1)}, dtype),
      flat(op, "rank", rank, x, {}, at::kLong), flatten_lead(reconstruction, 2));
  return reconstruction;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> project_reconstruct_bwd(
    const at::Tensor& grad,        // [*, N, D]
    const at::Tensor& x,           // [*, N, D]
    const at::Tensor& mean,        // [*, D]
    const at::Tensor& components,  // [*, K, D]
    const at::Tensor& rank) {      // [*]
  const char* op = "project_reconstruct";
  const c10::NoGradGuard no_grad;
  check_x(op, x);
  check_grad(op, grad, x);
  const auto dtype = mean.scalar_type();
  HIMO_CHECK_DTYPE(is_computing_dtype(dtype), op, "mean", "float32 or float64", dtype);
  HIMO_CHECK_SHAPE(components.dim() >= 2, op, "components", components, "[*, K, D]");
  const auto grad_x = at::empty(x.sizes(), x.options());
  const auto grad_mean = at::empty(mean.sizes(), mean.options());
  const auto grad_components = at::empty(components.sizes(), components.options());
  cpu::project_reconstruct_bwd(
      grad.resolve_neg(), x.resolve_neg(), flat(op, "mean", mean, x, {x.size(-1)}, dtype),
      flat(op, "components", components, x, {components.size(-2), x.size(-1)}, dtype),
      flat(op, "rank", rank, x, {}, at::kLong), flatten_lead(grad_x, 2), flatten_lead(grad_mean, 1),
      flatten_lead(grad_components, 2));
  return {grad_x, grad_mean, grad_components};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> pca_reconstruct_fwd(
    const at::Tensor& input,  // [*, N, D]
    double variance_threshold, const Floor& floor) {
  const c10::NoGradGuard no_grad;
  const auto x = input.resolve_neg();
  const auto [mean, eigenvalues, eigenvectors, rank] =
      decompose("pca_reconstruct", x, variance_threshold, floor);
  const auto reconstruction = at::empty(x.sizes(), x.options());
  cpu::pca_reconstruct_fwd(x, flatten_lead(mean, 1), flatten_lead(eigenvalues, 1),
                           flatten_lead(eigenvectors, 2), flatten_lead(rank, 0),
                           flatten_lead(reconstruction, 2));
  return {reconstruction, rank, mean, eigenvalues, eigenvectors};
}

at::Tensor pca_reconstruct_bwd(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& mean,
                               const at::Tensor& eigenvalues, const at::Tensor& eigenvectors,
                               const at::Tensor& rank, double gap_eps, bool differentiate_basis) {
  const char* op = "pca_reconstruct";
  const c10::NoGradGuard no_grad;
  check_x(op, x);
  check_grad(op, grad, x);
  const auto saved = flat_decomposition(op, x, mean, eigenvalues, eigenvectors, rank);
  const auto grad_x = at::empty(x.sizes(), x.options());
  cpu::pca_reconstruct_bwd(grad.resolve_neg(), x.resolve_neg(), saved.mean, saved.eigenvalues,
                           saved.eigenvectors, saved.rank, gap_eps, differentiate_basis,
                           flatten_lead(grad_x, 2));
  return grad_x;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> pca_moment_decompose(const at::Tensor& moment,
                                                                    const at::Tensor& mean,
                                                                    int64_t samples,
                                                                    double variance_threshold,
                                                                    const Floor& floor) {
  const char* op = "pca_moment";
  const c10::NoGradGuard no_grad;
  HIMO_CHECK_CPU(op, "moment", moment);
  HIMO_CHECK_SHAPE(moment.dim() == 2 && moment.size(0) == moment.size(1) && moment.size(0) > 0, op,
                   "moment", moment, "[D, D]");
  HIMO_CHECK_DTYPE(moment.scalar_type() == at::kDouble, op, "moment", at::kDouble,
                   moment.scalar_type());
  const auto eigenvectors = moment.resolve_neg().clone(at::MemoryFormat::Contiguous);
  const auto eigenvalues = at::empty({moment.size(0)}, eigenvectors.options());
  const auto rank = at::empty({}, eigenvectors.options().dtype(at::kLong));
  const auto means = flat(op, "mean", mean, moment, {moment.size(0)});
  cpu::decompose(eigenvectors.unsqueeze(0), means, samples, variance_threshold, floor,
                 eigenvalues.unsqueeze(0), rank.unsqueeze(0));
  return {eigenvalues, eigenvectors, rank};
}

at::Tensor pca_moment_reconstruct(const at::Tensor& x, const at::Tensor& mean,
                                  const at::Tensor& eigenvalues, const at::Tensor& eigenvectors,
                                  const at::Tensor& rank) {
  const c10::NoGradGuard no_grad;
  const auto saved = moment_decomposition(x, mean, eigenvalues, eigenvectors, rank);
  const auto reconstruction = at::empty(x.sizes(), x.options());
  cpu::moment_reconstruct(x.resolve_neg(), saved.mean, saved.eigenvalues, saved.eigenvectors,
                          saved.rank, reconstruction.unsqueeze(0));
  return reconstruction;
}

at::Tensor pca_moment_grad_projector(const at::Tensor& grad, const at::Tensor& x,
                                     const at::Tensor& mean) {
  const char* op = "pca_moment";
  const c10::NoGradGuard no_grad;
  check_rows(op, x);
  check_grad(op, grad, x);
  const auto means = flat(op, "mean", mean, x, {x.size(1)});
  const auto out = at::empty({x.size(1), x.size(1)}, means.options());
  cpu::moment_grad_projector(grad.resolve_neg(), x.resolve_neg(), means, out);
  return out;
}

at::Tensor pca_moment_bwd(const at::Tensor& grad, const at::Tensor& grad_mean, const at::Tensor& x,
                          const at::Tensor& mean, const std::optional<at::Tensor>& grad_projector,
                          const at::Tensor& eigenvalues, const at::Tensor& eigenvectors,
                          const at::Tensor& rank, double gap_eps) {
  const char* op = "pca_moment";
  const c10::NoGradGuard no_grad;
  const auto saved = moment_decomposition(x, mean, eigenvalues, eigenvectors, rank);
  check_grad(op, grad, x);
  const int64_t features = x.size(1);
  const auto grad_means = flat(op, "grad_mean", grad_mean, x, {features});
  at::Tensor projector;
  if (grad_projector) {
    projector = flat(op, "grad_projector", *grad_projector, x, {features, features});
  }
  const auto grad_x = at::empty(x.sizes(), x.options());
  cpu::moment_bwd(grad.resolve_neg(), grad_means, x.resolve_neg(), saved.mean, projector,
                  saved.eigenvalues, saved.eigenvectors, saved.rank, gap_eps, grad_x.unsqueeze(0));
  return grad_x;
}

}  // namespace himo
