// Python bindings of training/norm.hpp, attention.hpp, cross_entropy.hpp, embedding.hpp and
// adamw.hpp, and of common/host_pool.hpp.
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/host_pool.hpp"
#include "python/bindings.hpp"
#include "python/tensor_argument.hpp"
#include "training/adamw.hpp"
#include "training/attention.hpp"
#include "training/cross_entropy.hpp"
#include "training/embedding.hpp"
#include "training/norm.hpp"

namespace py = pybind11;

namespace fastgpt {
namespace {

Norm norm_of(py::handle x, py::handle weight, py::handle bias) {
  const Numbers<float> gains = numbers_of<float>(weight, "weight");
  if (gains.size == 0) throw std::invalid_argument("weight must not be empty");
  Norm norm;
  norm.columns = gains.size;
  norm.rows = numbers_of<float>(x, "x").size / norm.columns;
  norm.weight = gains.data;
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
    throw std::invalid_argument("residual and total must be given together");
  }
  const Floats to = any_floats(y, "y", size);
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
  const Floats to = any_floats(y, "y", size);
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

// Returns the dimensions and the input of an attention with qkv [batch, time, 3C] and log_sums
// [batch, heads, time], where C = heads * size. Throws std::invalid_argument if the sizes of the
// tensors do not match.
Attention attention_of(py::handle qkv, py::handle log_sums, std::size_t heads, std::size_t time) {
  const DlTensor seen = look_at_floats(qkv, "qkv", true);
  const std::size_t size = contiguous_size(seen, "qkv");
  const std::size_t rows = numbers_of<float>(log_sums, "log_sums").size;  // batch * heads * time
  Attention attention;
  attention.heads = heads;
  attention.time = time;
  attention.qkv = numbers_in(seen);
  if (heads == 0 || time == 0 || rows == 0) return attention;
  attention.batch = rows / (heads * time);
  attention.size = size / (3 * rows);
  if (attention.batch * heads * time != rows || attention.size * 3 * rows != size) {
    throw std::invalid_argument("the sizes of qkv and log_sums do not match heads and time");
  }
  return attention;
}

// Returns the data of a tensor with `size` elements and the dtype of qkv.
Floats like_qkv(const Attention& attention, py::handle tensor, const char* name, std::size_t size) {
  const Floats numbers = any_floats(tensor, name, size);
  if (numbers.bf16 != attention.qkv.bf16) {
    throw std::invalid_argument(std::string(name) + " must have the dtype of qkv");
  }
  return numbers;
}

void forward_of_attention(py::handle qkv, std::size_t heads, std::size_t time, py::handle y,
                          py::handle log_sums, unsigned threads) {
  const Attention attention = attention_of(qkv, log_sums, heads, time);
  const std::size_t rows = attention.batch * heads * time;
  const Floats to = like_qkv(attention, y, "y", rows * attention.size);
  float* sums = floats(log_sums, "log_sums", rows);
  const py::gil_scoped_release unlocked;
  attention_forward(attention, to, sums, threads);
}

void backward_of_attention(py::handle qkv, std::size_t heads, std::size_t time, py::handle y,
                           py::handle log_sums, py::handle grad_y, py::handle grad_qkv,
                           unsigned threads) {
  const Attention attention = attention_of(qkv, log_sums, heads, time);
  const std::size_t rows = attention.batch * heads * time, size = rows * attention.size;
  const Floats result = like_qkv(attention, y, "y", size);
  const float* sums = floats(log_sums, "log_sums", rows);
  const Floats grad = like_qkv(attention, grad_y, "grad_y", size);
  const Floats to = like_qkv(attention, grad_qkv, "grad_qkv", 3 * size);
  const py::gil_scoped_release unlocked;
  attention_backward(attention, result, sums, grad, to, threads);
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
  const Numbers<float> all = numbers_of<float>(logits, "logits");
  const Numbers<std::int64_t> labels = numbers_of<std::int64_t>(targets, "targets");
  if (labels.size == 0) return;
  LogitsChunk chunk;
  chunk.rows = labels.size;
  chunk.classes = all.size / chunk.rows;
  if (chunk.classes == 0 || chunk.classes * chunk.rows != all.size) {
    throw std::invalid_argument("logits must have a row for each target");
  }
  chunk.logits = all.data;
  chunk.targets = labels.data;
  chunk.ignored = ignored;
  float* to = floats(losses, "losses", chunk.rows);
  const py::gil_scoped_release unlocked;
  check_targets(chunk);
  cross_entropy(chunk, gradient, scale, to, threads);
}

void add_to_rows(py::handle ids, py::handle values, py::handle table, unsigned threads) {
  const Numbers<std::int64_t> names = numbers_of<std::int64_t>(ids, "ids");
  const Numbers<float> rows = numbers_of<float>(values, "values");
  const Numbers<float> all = numbers_of<float>(table, "table");
  if (names.size == 0) return;
  const std::size_t columns = rows.size / names.size;
  if (columns == 0 || columns * names.size != rows.size || all.size % columns != 0) {
    throw std::invalid_argument("values must have a row for each id, with the table's row size");
  }
  const py::gil_scoped_release unlocked;
  const auto n_rows = static_cast<std::int64_t>(all.size / columns);
  for (std::size_t i = 0; i < names.size; ++i) {
    if (names.data[i] < 0 || names.data[i] >= n_rows) {
      throw std::out_of_range("id " + std::to_string(names.data[i]) + " is out of bounds");
    }
  }
  add_rows(names.data, names.size, columns, rows.data, all.data, threads);
}

// Returns an uninitialized array in the pool's memory, of float32 or of bfloat16 (as uint16), or
// None if the pool has no room. The memory is released with the array.
py::object pool_array(const std::vector<py::ssize_t>& shape, bool bf16) {
  std::size_t size = 1;
  for (const py::ssize_t length : shape) size *= static_cast<std::size_t>(length);
  void* block = HostPool::get().allocate(size * (bf16 ? sizeof(Bfloat16) : sizeof(float)));
  if (block == nullptr) return py::none();
  const py::capsule owner(block, [](void* released) { HostPool::get().release(released); });
  if (bf16) return py::array_t<Bfloat16>(shape, static_cast<Bfloat16*>(block), owner);
  return py::array_t<float>(shape, static_cast<float*>(block), owner);
}

// One row of each per parameter. Addresses: the number of elements, then the addresses of
// parameter, gradient, mean (exp_avg), mean square (exp_avg_sq) and step, all contiguous float32
// arrays. Hyper: lr, beta1, beta2, eps, weight decay.
using Addresses = std::array<std::size_t, 6>;
using Hyper = std::array<double, 5>;

double step_of_adamw(const std::vector<Addresses>& rows, const std::vector<Hyper>& rates,
                     double max_norm, unsigned threads) {
  if (rows.size() != rates.size()) throw std::invalid_argument("rows and rates differ in length");
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
  m.def("attention_is_fast", &attention_is_fast);
  m.def("attention_forward", &forward_of_attention, py::arg("qkv"), py::arg("heads"),
        py::arg("time"), py::arg("y"), py::arg("log_sums"), py::arg("threads"));
  m.def("attention_backward", &backward_of_attention, py::arg("qkv"), py::arg("heads"),
        py::arg("time"), py::arg("y"), py::arg("log_sums"), py::arg("grad_y"), py::arg("grad_qkv"),
        py::arg("threads"));
  m.def("add_rows", &add_to_rows, py::arg("ids"), py::arg("values"), py::arg("table"),
        py::arg("threads"));
  m.def("adamw", &step_of_adamw, py::arg("rows"), py::arg("rates"), py::arg("max_norm"),
        py::arg("threads"));
  m.def("pool_array", &pool_array, py::arg("shape"), py::arg("bf16") = false);
  m.def("trim_pool", [] { HostPool::get().trim(); });
  m.def("pool_usage",
        [] { return py::make_tuple(HostPool::get().held(), HostPool::get().used()); });
}

}  // namespace fastgpt
