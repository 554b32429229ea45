// The Python module himo_kernels._C. The GIL is released while a kernel runs.

#include <ATen/Config.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include <algorithm>

#include "covariance.h"
#include "cpu/tile_products.h"
#include "himo_loss.h"
#include "info_nce.h"
#include "info_nce_pairs.h"
#include "normalize.h"
#include "pca.h"
#include "sigmoid_loss.h"

namespace py = pybind11;

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#elif defined(__GNUC__)
constexpr const char* kCompiler = "gcc " __VERSION__;
#else
constexpr const char* kCompiler = "unknown";
#endif

#ifdef _OPENMP
constexpr bool kOpenMP = true;
#else
constexpr bool kOpenMP = false;
#endif

// himo_kernels.extension compares this with the running torch and with its own version.
py::dict build_info() {
  py::dict info;
  info["version"] = HIMO_VERSION;
  info["torch"] = TORCH_VERSION;
  info["compiler"] = kCompiler;
  info["cxx_standard"] = static_cast<long>(__cplusplus);
  info["cxx_flags"] = HIMO_CXX_FLAGS;
  info["openmp"] = kOpenMP;
  return info;
}

// The tensors in the order of the schema in himo_kernels/himo_loss/op.py.
std::tuple<at::Tensor, at::Tensor, at::Tensor> himo_loss_bwd(
    const at::Tensor& grad_contrastive_loss, const at::Tensor& grad_component_loss,
    const at::Tensor& images, const at::Tensor& texts, const at::Tensor& logit_scale,
    const at::Tensor& row_nll, const at::Tensor& column_nll, const at::Tensor& component_row_nll,
    const at::Tensor& component_column_nll, const at::Tensor& mean, const at::Tensor& eigenvalues,
    const at::Tensor& eigenvectors, const at::Tensor& rank, bool normalize_components,
    double label_smoothing, bool differentiate_keys, bool differentiate_basis, double gap_eps,
    bool needs_images, bool needs_texts, const std::optional<at::Tensor>& products,
    const std::optional<at::Tensor>& factors) {
  const himo::HimoLossSaved saved{images,
                                  texts,
                                  logit_scale,
                                  row_nll,
                                  column_nll,
                                  component_row_nll,
                                  component_column_nll,
                                  mean,
                                  eigenvalues,
                                  eigenvectors,
                                  rank};
  return himo::himo_loss_bwd(grad_contrastive_loss, grad_component_loss, saved,
                             normalize_components, label_smoothing, differentiate_keys,
                             differentiate_basis, gap_eps, needs_images, needs_texts, products,
                             factors);
}

using Scale = std::variant<at::Tensor, double>;

// The arguments of plain calls are any objects, because the caller has checked none; see
// Operator.plain in himo_kernels/dispatch.py. Those of other types than these give nothing.
std::optional<std::vector<at::Tensor>> tensors_of(const py::tuple& values) {
  std::vector<at::Tensor> tensors;
  for (const auto& value : values) {
    if (!THPVariable_CheckExact(value.ptr())) return {};
    tensors.push_back(THPVariable_Unpack(value.ptr()));
  }
  return tensors;
}

std::optional<Scale> scale_of(py::handle value) {
  if (PyFloat_CheckExact(value.ptr())) return PyFloat_AS_DOUBLE(value.ptr());
  if (THPVariable_CheckExact(value.ptr())) return THPVariable_Unpack(value.ptr());
  return {};
}

bool are_floats(std::initializer_list<py::handle> values) {
  return std::all_of(values.begin(), values.end(),
                     [](py::handle value) { return PyFloat_CheckExact(value.ptr()); });
}

bool are_flags(std::initializer_list<py::handle> values) {
  return std::all_of(values.begin(), values.end(),
                     [](py::handle value) { return PyBool_Check(value.ptr()); });
}

// The results of a plain call, or None.
template <typename function_t>
py::object results_of(const py::tuple& features, py::handle logit_scale, const function_t& call) {
  const auto tensors = tensors_of(features);
  const auto scale = scale_of(logit_scale);
  if (!tensors || !scale) return py::none();
  std::optional<std::vector<at::Tensor>> results;
  {
    const py::gil_scoped_release no_gil;
    results = call(*tensors, *scale);
  }
  return results ? py::object(py::tuple(py::cast(*results))) : py::none();
}

py::object info_nce_plain(const py::tuple& features, py::handle logit_scale,
                          py::handle label_smoothing, py::handle differentiate_keys,
                          int64_t most_cached) {
  if (!are_floats({label_smoothing}) || !are_flags({differentiate_keys})) return py::none();
  const double smoothing = PyFloat_AS_DOUBLE(label_smoothing.ptr());
  const bool differentiates = differentiate_keys.ptr() == Py_True;
  return results_of(features, logit_scale, [&](const auto& tensors, const auto& scale) {
    return himo::info_nce_plain(tensors, scale, smoothing, differentiates, most_cached);
  });
}

py::object himo_loss_plain(const py::tuple& features, py::handle logit_scale,
                           py::handle normalize_features, py::handle variance_threshold,
                           py::handle variance_floor, py::handle normalize_components,
                           py::handle label_smoothing, py::handle differentiate_keys,
                           py::handle differentiate_basis, py::handle gap_eps,
                           int64_t most_cached) {
  if (!are_floats({variance_threshold, label_smoothing, gap_eps}) ||
      !are_flags(
          {normalize_features, normalize_components, differentiate_keys, differentiate_basis})) {
    return py::none();
  }
  std::optional<double> floor;
  if (are_floats({variance_floor})) {
    floor = PyFloat_AS_DOUBLE(variance_floor.ptr());
  } else if (!PyUnicode_CheckExact(variance_floor.ptr()) ||
             PyUnicode_CompareWithASCIIString(variance_floor.ptr(), "relative") != 0) {
    return py::none();
  }
  const himo::HimoLossSettings settings{
      PyFloat_AS_DOUBLE(variance_threshold.ptr()), floor,
      normalize_features.ptr() == Py_True,         normalize_components.ptr() == Py_True,
      PyFloat_AS_DOUBLE(label_smoothing.ptr()),    differentiate_keys.ptr() == Py_True,
      differentiate_basis.ptr() == Py_True,        PyFloat_AS_DOUBLE(gap_eps.ptr())};
  return results_of(features, logit_scale, [&](const auto& tensors, const auto& scale) {
    return himo::himo_loss_plain(tensors, scale, settings, most_cached);
  });
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using no_gil = py::call_guard<py::gil_scoped_release>;
  m.doc() = "Compiled kernels of himo_kernels; call them through its public functions.";
  m.def("build_info", &build_info);
  m.def("covariance_fwd", &himo::covariance_fwd, py::arg("x"), py::arg("dtype"), no_gil());
  m.def("gram_fwd", &himo::gram_fwd, py::arg("x"), py::arg("dtype"), no_gil());
  m.def("covariance_bwd", &himo::covariance_bwd, py::arg("grad_mean"), py::arg("grad_covariance"),
        py::arg("x"), py::arg("mean"), no_gil());
  m.def("gram_bwd", &himo::gram_bwd, py::arg("grad_mean"), py::arg("grad_gram"), py::arg("x"),
        py::arg("mean"), no_gil());
  m.def("info_nce_fwd", &himo::info_nce_fwd, py::arg("query"), py::arg("key"),
        py::arg("logit_scale"), py::arg("label_smoothing"), py::arg("products"), no_gil());
  // Wrapped: saving tensors may run Python's hooks, and what they raise is not pybind11's.
  m.def("info_nce_plain", torch::wrap_pybind_function(info_nce_plain));
  m.def("himo_loss_plain", torch::wrap_pybind_function(himo_loss_plain));
  m.def("info_nce_bwd", &himo::info_nce_bwd, py::arg("grad_loss"), py::arg("query"), py::arg("key"),
        py::arg("logit_scale"), py::arg("row_nll"), py::arg("column_nll"),
        py::arg("label_smoothing"), py::arg("differentiate_keys"), py::arg("needs_query"),
        py::arg("needs_key"), py::arg("products"), py::arg("query_sum"), no_gil());
  m.def("info_nce_block_fwd", &himo::info_nce_block_fwd, py::arg("query"), py::arg("key"),
        py::arg("logit_scale"), py::arg("row_positives"), py::arg("column_positives"),
        py::arg("offset"), no_gil());
  m.def("info_nce_block_bwd", &himo::info_nce_block_bwd, py::arg("query"), py::arg("key"),
        py::arg("logit_scale"), py::arg("row_positives"), py::arg("row_nll"), py::arg("row_weight"),
        py::arg("column_positives"), py::arg("column_nll"), py::arg("column_weight"),
        py::arg("offset"), py::arg("label_smoothing"), py::arg("total"),
        py::arg("differentiate_keys"), no_gil());
  m.def("sigmoid_loss_fwd", &himo::sigmoid_loss_fwd, py::arg("query"), py::arg("key"),
        py::arg("logit_scale"), py::arg("logit_bias"), py::arg("offset"), py::arg("divisor"),
        py::arg("needs_query"), py::arg("needs_key"), py::arg("needs_scalars"), no_gil());
  m.def("row_products", &himo::row_products, py::arg("x"), py::arg("y"), py::arg("places"),
        no_gil());
  m.def("info_nce_pairs_fwd", &himo::info_nce_pairs_fwd, no_gil());
  m.def("info_nce_pairs_bwd", &himo::info_nce_pairs_bwd, no_gil());
  m.def("himo_loss_fwd", &himo::himo_loss_fwd, no_gil());
  m.def("himo_loss_bwd", &himo_loss_bwd, no_gil());
  m.def("normalize_fwd", &himo::normalize_fwd, py::arg("x"), no_gil());
  m.def("normalize_bwd", &himo::normalize_bwd, py::arg("grad"), py::arg("x"), no_gil());
  m.def("eigensolver", &himo::eigensolver, py::arg("n"));
  m.def("solve_symmetric", &himo::solve_symmetric, py::arg("matrix"), py::arg("solver"), no_gil());
  // Whether bfloat16 is multiplied as bfloat16 here; raised to float32 otherwise.
  m.def("multiplies_bfloat16", &himo::cpu::multiplies_bfloat16);
  m.def("pca_decompose", &himo::pca_decompose, py::arg("x"), py::arg("variance_threshold"),
        py::arg("floor"), no_gil());
  m.def("pca_fwd", &himo::pca_fwd, py::arg("x"), py::arg("variance_threshold"), py::arg("floor"),
        no_gil());
  m.def("pca_bwd", &himo::pca_bwd, py::arg("grad_mean"), py::arg("grad_eigenvalues"),
        py::arg("grad_components"), py::arg("x"), py::arg("mean"), py::arg("eigenvalues"),
        py::arg("eigenvectors"), py::arg("rank"), py::arg("gap_eps"), no_gil());
  m.def("project_reconstruct_fwd", &himo::project_reconstruct_fwd, py::arg("x"), py::arg("mean"),
        py::arg("components"), py::arg("rank"), no_gil());
  m.def("project_reconstruct_bwd", &himo::project_reconstruct_bwd, py::arg("grad"), py::arg("x"),
        py::arg("mean"), py::arg("components"), py::arg("rank"), no_gil());
  m.def("pca_reconstruct_fwd", &himo::pca_reconstruct_fwd, py::arg("x"),
        py::arg("variance_threshold"), py::arg("floor"), no_gil());
  m.def("pca_reconstruct_bwd", &himo::pca_reconstruct_bwd, py::arg("grad"), py::arg("x"),
        py::arg("mean"), py::arg("eigenvalues"), py::arg("eigenvectors"), py::arg("rank"),
        py::arg("gap_eps"), py::arg("differentiate_basis"), no_gil());
  m.def("pca_moment_decompose", &himo::pca_moment_decompose, py::arg("moment"), py::arg("mean"),
        py::arg("samples"), py::arg("variance_threshold"), py::arg("floor"), no_gil());
  m.def("pca_moment_reconstruct", &himo::pca_moment_reconstruct, py::arg("x"), py::arg("mean"),
        py::arg("eigenvalues"), py::arg("eigenvectors"), py::arg("rank"), no_gil());
  m.def("pca_moment_grad_projector", &himo::pca_moment_grad_projector, py::arg("grad"),
        py::arg("x"), py::arg("mean"), no_gil());
  m.def("pca_moment_bwd", &himo::pca_moment_bwd, py::arg("grad"), py::arg("grad_mean"),
        py::arg("x"), py::arg("mean"), py::arg("grad_projector"), py::arg("eigenvalues"),
        py::arg("eigenvectors"), py::arg("rank"), py::arg("gap_eps"), no_gil());
}
