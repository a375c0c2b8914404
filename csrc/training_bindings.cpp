// What Python sees of norm.hpp, cross_entropy.hpp and adamw.hpp.
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "adamw.hpp"
#include "bindings.hpp"
#include "cross_entropy.hpp"
#include "norm.hpp"
#include "tensor_argument.hpp"

namespace py = pybind11;

namespace fastgpt {
namespace {

std::size_t size_of(py::handle tensor) {
  return py::cast<std::size_t>(call(tensor, TensorNames::get().numel));
}

Norm norm_of(py::handle x, py::handle weight, py::handle bias) {
  Norm norm;
  norm.columns = size_of(weight);
  if (norm.columns == 0) throw std::invalid_argument("weight must not be empty");
  norm.rows = size_of(x) / norm.columns;
  norm.weight = floats(weight, "weight", norm.columns);
  norm.bias = floats(bias, "bias", norm.columns);
  return norm;
}

void forward_of_norm(py::handle x, py::handle residual, py::handle weight, py::handle bias,
                     float eps, py::handle total, py::handle y, py::handle mean, py::handle rstd,
                     unsigned threads) {
  const Norm norm = norm_of(x, weight, bias);
  const std::size_t size = norm.rows * norm.columns;
  const float* from = floats(x, "x", size);
  const float* added = floats(residual, "residual", size);
  float* sum = floats(total, "total", size);
  if ((added == nullptr) != (sum == nullptr)) {
    throw std::invalid_argument("residual and total go together");
  }
  float* to = floats(y, "y", size);
  float* means = floats(mean, "mean", norm.rows);
  float* rstds = floats(rstd, "rstd", norm.rows);
  const py::gil_scoped_release unlocked;
  norm_forward(norm, from, added, eps, sum, to, means, rstds, threads);
}

void apply_norm(py::handle total, py::handle weight, py::handle bias, py::handle mean,
                py::handle rstd, py::handle y, unsigned threads) {
  const Norm norm = norm_of(total, weight, bias);
  const std::size_t size = norm.rows * norm.columns;
  const float* from = floats(total, "total", size);
  const float* means = floats(mean, "mean", norm.rows);
  const float* rstds = floats(rstd, "rstd", norm.rows);
  float* to = floats(y, "y", size);
  const py::gil_scoped_release unlocked;
  norm_apply(norm, from, means, rstds, to, threads);
}

void backward_of_norm(py::handle grad_y, py::handle grad_total, py::handle total, py::handle weight,
                      py::handle mean, py::handle rstd, py::handle grad_x, py::handle grad_weight,
                      py::handle grad_bias, unsigned threads) {
  const Norm norm = norm_of(total, weight, py::none());
  const std::size_t size = norm.rows * norm.columns;
  const float* grad = floats(grad_y, "grad_y", size);
  const float* passed = floats(grad_total, "grad_total", size);
  const float* from = floats(total, "total", size);
  const float* means = floats(mean, "mean", norm.rows);
  const float* rstds = floats(rstd, "rstd", norm.rows);
  float* to = floats(grad_x, "grad_x", size);
  float* of_weight = floats(grad_weight, "grad_weight", norm.columns);
  float* of_bias = floats(grad_bias, "grad_bias", norm.columns);
  const py::gil_scoped_release unlocked;
  norm_backward(norm, grad, passed, from, means, rstds, to, of_weight, of_bias, threads);
}

void check_targets(const LogitsChunk& chunk) {
  for (std::size_t row = 0; row < chunk.rows; ++row) {
    const std::int64_t target = chunk.targets[row];
    if (target == chunk.ignored) continue;
    if (target < 0 || target >= static_cast<std::int64_t>(chunk.classes)) {
      throw std::out_of_range("Target " + std::to_string(target) + " is out of bounds.");
    }
  }
}

void losses_of_logits(py::handle logits, py::handle targets, std::int64_t ignored, bool gradient,
                      float scale, py::handle losses, unsigned threads) {
  LogitsChunk chunk;
  chunk.rows = size_of(losses);
  if (chunk.rows == 0) return;
  chunk.classes = size_of(logits) / chunk.rows;
  chunk.logits = floats(logits, "logits", chunk.rows * chunk.classes);
  chunk.targets = static_cast<const std::int64_t*>(
      address_of(targets, "targets", chunk.rows, TensorNames::get().int64));
  chunk.ignored = ignored;
  float* to = floats(losses, "losses", chunk.rows);
  const py::gil_scoped_release unlocked;
  check_targets(chunk);
  cross_entropy(chunk, gradient, scale, to, threads);
}

// One row a parameter: its size, then the addresses of parameter, gradient, mean, mean square and
// step, of contiguous fp32 arrays; then lr, beta1, beta2, eps, weight decay.
using Addresses = std::array<std::size_t, 6>;
using Hyper = std::array<double, 5>;

double step_of_adamw(const std::vector<Addresses>& rows, const std::vector<Hyper>& rates,
                     double max_norm, unsigned threads) {
  if (rows.size() != rates.size()) throw std::invalid_argument("as many rates as rows are needed");
  std::vector<AdamWTensor> tensors;
  tensors.reserve(rows.size());
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const auto number = [&](std::size_t which) { return reinterpret_cast<float*>(rows[i][which]); };
    const Hyper& r = rates[i];
    tensors.push_back({rows[i][0], number(1), number(2), number(3), number(4), number(5), r[0],
                       r[1], r[2], r[3], r[4]});
  }
  const py::gil_scoped_release unlocked;
  return clipped_adamw(tensors, max_norm, threads);
}

}  // namespace

void bind_training(py::module_& m) {
  m.def("norm_forward", &forward_of_norm, py::arg("x"), py::arg("residual"), py::arg("weight"),
        py::arg("bias"), py::arg("eps"), py::arg("total"), py::arg("y"), py::arg("mean"),
        py::arg("rstd"), py::arg("threads"));
  m.def("norm_apply", &apply_norm, py::arg("total"), py::arg("weight"), py::arg("bias"),
        py::arg("mean"), py::arg("rstd"), py::arg("y"), py::arg("threads"));
  m.def("norm_backward", &backward_of_norm, py::arg("grad_y"), py::arg("grad_total"),
        py::arg("total"), py::arg("weight"), py::arg("mean"), py::arg("rstd"), py::arg("grad_x"),
        py::arg("grad_weight"), py::arg("grad_bias"), py::arg("threads"));
  m.def("cross_entropy", &losses_of_logits, py::arg("logits"), py::arg("targets"),
        py::arg("ignored"), py::arg("gradient"), py::arg("scale"), py::arg("losses"),
        py::arg("threads"));
  m.def("adamw", &step_of_adamw, py::arg("rows"), py::arg("rates"), py::arg("max_norm"),
        py::arg("threads"));
}

}  // namespace fastgpt
