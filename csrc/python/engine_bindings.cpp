// Python bindings of engine/.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "common/arithmetic.hpp"
#include "common/parallel.hpp"
#include "engine/generation.hpp"
#include "engine/kernel_set.hpp"
#include "python/bindings.hpp"
#include "python/tensor_argument.hpp"
#include "simd/reductions.hpp"

namespace py = pybind11;

namespace fastgpt {
namespace {

using engine::Engine;
using engine::Format;
using engine::Generation;
using engine::kPanel;
using Bytes = py::array_t<std::uint8_t>;
using FloatArray = py::array_t<float>;

constexpr std::size_t kMostThreads = 1024;

Format format_named(const std::string& name) {
  if (name == "float32") return Format::kFloat32;
  if (name == "bfloat16") return Format::kBfloat16;
  if (name == "int8") return Format::kInt8;
  if (name == "int4") return Format::kInt4;
  throw std::invalid_argument("dtype must be float32, bfloat16, int8 or int4, not " + name);
}

std::size_t checked_group(std::size_t group) {
  if (group != 32 && group != 64) throw std::invalid_argument("group must be 32 or 64");
  return group;
}

// Throws std::invalid_argument with a message about the weight.
[[noreturn]] void fail_weight(const std::string& name, const std::string& what) {
  throw std::invalid_argument(name + " " + what);
}

// Throws std::invalid_argument if an element is NaN or infinite. x - x is 0 for finite numbers and
// NaN otherwise, and NaN persists in the sum.
void check_finite(const std::string& name, const float* x, std::size_t size) {
  const float sum = lane_sum<float, 16>(size, [=](std::size_t i) { return x[i] - x[i]; });
  if (!(sum == 0.0F)) fail_weight(name, "contains NaN or infinity");
}

// Returns the data of a contiguous CPU tensor of `size` elements of dtype int8 (`with_sign`) or
// uint8.
const std::uint8_t* bytes(py::handle tensor, const std::string& name, std::size_t size,
                          bool with_sign) {
  const DlTensor seen = view_tensor(tensor, name.c_str(), with_sign ? kDlInt : kDlUnsigned, 8,
                                    with_sign ? "int8" : "uint8");
  check_size(contiguous_size(seen, name.c_str()), size, name.c_str());
  return static_cast<const std::uint8_t*>(memory_of(seen));
}

// --- loading weights -----------------------------------------------------------------------------

// Splits a matrix's panels evenly among the threads of the pool, and calls take(panels) on each.
template <typename Take>
void in_parts(engine::ThreadPool& pool, const engine::Matrix& matrix, const Take& take) {
  const py::gil_scoped_release unlocked;
  pool.run([&](std::size_t rank) { take(share_of(matrix.panels(), rank, pool.size())); });
}

// Loads a weight matrix into the engine: a float32 tensor, or for int8 and int4 a tuple of integers
// and scales.
void take_matrix(Engine& to, const std::string& name, py::handle value) {
  engine::Matrix& matrix = to.network.linear(name)->weight;
  const std::size_t outputs = matrix.outputs(), inputs = matrix.inputs();
  if (!engine::is_integer(matrix.format())) {
    const float* weights = floats(value, name.c_str(), outputs * inputs);
    check_finite(name, weights, outputs * inputs);
    in_parts(to.pool, matrix, [&](Range part) { matrix.pack_floats(weights, part); });
    return;
  }
  if (!py::isinstance<py::tuple>(value) || py::len(value) != 2) {
    fail_weight(name, "must be a pair of integers and scales");
  }
  const auto pair = py::reinterpret_borrow<py::tuple>(value);
  const bool eight = matrix.format() == Format::kInt8;
  const std::size_t columns = eight ? inputs : matrix.groups() * matrix.group() / 2;
  const std::size_t scale_count = eight ? outputs : outputs * matrix.groups();
  const std::uint8_t* integers = bytes(pair[0], name, outputs * columns, eight);
  const std::string scales_name = name + "'s scales";
  const float* scales = floats(pair[1], scales_name.c_str(), scale_count);
  check_finite(scales_name, scales, scale_count);
  for (std::size_t i = 0; eight && i < outputs * columns; ++i) {
    if (integers[i] == 0x80) fail_weight(name, "contains -128; weights must be in [-127, 127]");
  }
  in_parts(to.pool, matrix, [&](Range part) { matrix.pack_integers(integers, scales, part); });
}

// Loads a bias or a LayerNorm parameter into the engine.
void take_vector(Engine& to, const std::string& name, py::handle value) {
  std::vector<float>& vector = *to.network.vector(name);
  // The biases of linear layers are padded to whole panels; their size is that of the layer's
  // output.
  const bool bias = name.find(".c_") != std::string::npos;
  const engine::Linear* linear =
      bias ? to.network.linear(name.substr(0, name.size() - 4) + "weight") : nullptr;
  const std::size_t size = bias ? linear->weight.outputs() : vector.size();
  const float* from = floats(value, name.c_str(), size);
  check_finite(name, from, size);
  std::copy(from, from + size, vector.begin());
}

bool ends_with(const std::string& text, const std::string& end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

std::shared_ptr<Engine> make_engine(const py::dict& config, const std::string& dtype,
                                    std::size_t group, std::size_t threads,
                                    const std::string& instruction_set, const py::object& weights) {
  if (threads < 1 || threads > kMostThreads) {
    throw std::invalid_argument("threads must be from 1 to 1024, not " + std::to_string(threads));
  }
  engine::Shape shape;
  shape.vocab_size = config["vocab_size"].cast<std::size_t>();
  shape.block_size = config["block_size"].cast<std::size_t>();
  shape.n_layer = config["n_layer"].cast<std::size_t>();
  shape.n_head = config["n_head"].cast<std::size_t>();
  shape.n_embd = config["n_embd"].cast<std::size_t>();
  shape.epsilon = config["layer_norm_eps"].cast<float>();
  shape.tied = config["tie_weights"].cast<bool>();
  const engine::Kernels kernels = engine::kernel_set(instruction_set);
  const auto made =
      std::make_shared<Engine>(shape, format_named(dtype), checked_group(group), threads, kernels);
  std::size_t taken = 0;
  for (const std::string& name : made->network.matrix_names()) {
    if (!weights.contains(name)) fail_weight(name, "is missing");
    take_matrix(*made, name, py::object(weights[name.c_str()]));
    ++taken;
  }
  for (const std::string& name : made->network.vector_names()) {
    if (!weights.contains(name)) {
      if (!ends_with(name, ".bias")) fail_weight(name, "is missing");
      continue;  // a model without biases, which remain zero
    }
    take_vector(*made, name, py::object(weights[name.c_str()]));
    ++taken;
  }
  if (taken == py::len(weights)) return made;
  for (const py::handle name : weights) {
    const auto text = name.cast<std::string>();
    if (made->network.linear(text) == nullptr && made->network.vector(text) == nullptr) {
      fail_weight(text, "is not a weight of this model");
    }
  }
  return made;
}

// --- reading weights -----------------------------------------------------------------------------

py::tuple integer_arrays(const engine::QuantizedMatrix& from, std::size_t outputs) {
  const auto rows = static_cast<py::ssize_t>(outputs);
  const auto columns = static_cast<py::ssize_t>(from.integers.size()) / rows;
  const auto groups = static_cast<py::ssize_t>(from.scales.size()) / rows;
  return py::make_tuple(Bytes({rows, columns}, from.integers.data()),
                        FloatArray({rows, groups}, from.scales.data()));
}

py::object matrix_of(Engine& self, const std::string& name) {
  const engine::Linear* linear = self.network.linear(name);
  if (linear == nullptr) throw py::key_error(name);
  const engine::Matrix& matrix = linear->weight;
  if (engine::is_integer(matrix.format())) {
    return integer_arrays(matrix.integers(), matrix.outputs());
  }
  const std::vector<float> all = matrix.floats();
  return FloatArray(
      {static_cast<py::ssize_t>(matrix.outputs()), static_cast<py::ssize_t>(matrix.inputs())},
      all.data());
}

FloatArray vector_of(Engine& self, const std::string& name) {
  const std::vector<float>* vector = self.network.vector(name);
  if (vector == nullptr) throw py::key_error(name);
  return FloatArray(static_cast<py::ssize_t>(vector->size()), vector->data());
}

// Quantizes the rows of a weight matrix on several threads, and returns (integers, scales).
py::tuple quantize_weights(py::handle weights, std::size_t outputs, const std::string& dtype,
                           std::size_t group, std::size_t threads, const std::string& name) {
  const Format format = format_named(dtype);
  if (!engine::is_integer(format)) throw std::invalid_argument("dtype must be int8 or int4");
  const Numbers<float> numbers = numbers_of<float>(weights, name.c_str());
  if (outputs == 0 || numbers.size == 0 || numbers.size % outputs != 0) {
    fail_weight(name, "must be rows of equal size");
  }
  checked_group(group);
  check_finite(name, numbers.data, numbers.size);
  const std::size_t inputs = numbers.size / outputs;
  const std::size_t parts = std::min(std::max(threads, std::size_t{1}), outputs);
  engine::QuantizedMatrix all(format, outputs, inputs, group);
  {
    const py::gil_scoped_release unlocked;
    run_concurrently(parts, [&](std::size_t i) {
      const Range rows = share_of(outputs, i, parts);
      engine::quantize(numbers.data, rows, inputs, format, group, all);
    });
  }
  return integer_arrays(all, outputs);
}

// --- generation ----------------------------------------------------------------------------------

Generation::Ids checked_ids(const std::vector<std::int64_t>& ids, const Engine& self) {
  if (ids.empty()) throw std::invalid_argument("a prompt must have at least one token");
  Generation::Ids checked;
  checked.reserve(ids.size());
  for (const std::int64_t id : ids) {
    if (id < 0 || id >= static_cast<std::int64_t>(self.network.shape.vocab_size)) {
      throw std::invalid_argument("token id " + std::to_string(id) +
                                  " is outside the model's vocabulary of " +
                                  std::to_string(self.network.shape.vocab_size));
    }
    checked.push_back(static_cast<std::uint32_t>(id));
  }
  return checked;
}

engine::Sampling sampling_of(const py::dict& settings) {
  engine::Sampling sampling;
  sampling.temperature = settings["temperature"].cast<double>();
  sampling.top_k = settings["top_k"].cast<std::size_t>();
  sampling.top_p = settings["top_p"].cast<double>();
  sampling.min_p = settings["min_p"].cast<double>();
  sampling.repetition_penalty = settings["repetition_penalty"].cast<double>();
  sampling.presence_penalty = settings["presence_penalty"].cast<double>();
  sampling.frequency_penalty = settings["frequency_penalty"].cast<double>();
  return sampling;
}

std::unique_ptr<Generation> make_generation(const std::shared_ptr<Engine>& self,
                                            const std::vector<std::vector<std::int64_t>>& prompts,
                                            std::size_t copies, std::size_t max_new_tokens,
                                            const py::dict& settings,
                                            const std::vector<std::uint64_t>& seeds,
                                            std::optional<std::uint32_t> stop, bool with_logprobs) {
  if (prompts.empty()) throw std::invalid_argument("there must be at least one prompt");
  if (copies < 1 || seeds.size() != prompts.size() * copies) {
    throw std::invalid_argument("each copy of each prompt needs a seed");
  }
  std::vector<Generation::Ids> checked;
  for (const auto& prompt : prompts) checked.push_back(checked_ids(prompt, *self));
  return std::make_unique<Generation>(self, checked, copies, max_new_tokens, sampling_of(settings),
                                      seeds, stop, with_logprobs);
}

FloatArray read_logits(Generation& self, std::size_t vocab_size) {
  const float* logits = nullptr;
  {
    const py::gil_scoped_release unlocked;
    logits = self.read();
  }
  const auto rows = static_cast<py::ssize_t>(self.rows());
  FloatArray all({rows, static_cast<py::ssize_t>(vocab_size)});
  for (std::size_t r = 0; r < self.rows(); ++r) {
    const float* row = logits + r * self.logits_stride();
    std::copy(row, row + vocab_size, all.mutable_data(static_cast<py::ssize_t>(r)));
  }
  return all;
}

std::optional<std::vector<std::int64_t>> step(Generation& self) {
  std::vector<std::int64_t> tokens(self.rows());
  const py::gil_scoped_release unlocked;
  if (!self.step(tokens.data())) return std::nullopt;
  return tokens;
}

std::vector<double> logprobs(const Generation& self) {
  std::vector<double> all;
  for (std::size_t r = 0; r < self.rows(); ++r) all.push_back(self.logprob(r));
  return all;
}

FloatArray logits_of(Engine& self, const std::vector<std::int64_t>& ids) {
  const Generation::Ids checked = checked_ids(ids, self);
  if (checked.size() > self.network.shape.block_size) {
    throw std::invalid_argument(std::to_string(checked.size()) +
                                " tokens are more than the model's context of " +
                                std::to_string(self.network.shape.block_size));
  }
  FloatArray all({static_cast<py::ssize_t>(checked.size()),
                  static_cast<py::ssize_t>(self.network.shape.vocab_size)});
  float* to = all.mutable_data();
  const py::gil_scoped_release unlocked;
  engine::all_logits(self, checked, to);
  return all;
}

// --- tests only ----------------------------------------------------------------------------------

// Returns the product of x [rows, inputs] and a weight matrix of an engine, plus its bias, computed
// by the engine's kernels.
FloatArray multiply_with(Engine& self, const std::string& name, py::handle x, std::size_t rows) {
  const engine::Linear* linear = self.network.linear(name);
  if (linear == nullptr) throw py::key_error(name);
  const engine::Matrix& matrix = linear->weight;
  const float* from = floats(x, "x", rows * matrix.inputs());
  const std::size_t stride = matrix.input_words() + 1;
  std::vector<float> words(rows * stride), scales(rows * matrix.groups());
  std::vector<std::int32_t> quads(rows * stride), sums(rows * matrix.groups());
  for (std::size_t i = 0; i < rows; ++i) {
    const std::size_t group = i * matrix.groups();
    self.kernels.prepare(matrix.format(), matrix.group(), from + i * matrix.inputs(),
                         matrix.inputs(),
                         {words.data() + i * stride, quads.data() + i * stride,
                          scales.data() + group, sums.data() + group});
  }
  engine::Product product = matrix.product(linear->bias.data());
  product.x = {words.data(), quads.data(), stride, scales.data(), sums.data()};
  const std::size_t columns = matrix.panels() * kPanel;
  std::vector<float> y(rows * columns);
  product.y = y.data();
  product.y_stride = columns;
  product.rows.end = rows;
  product.panels.end = matrix.panels();
  self.kernels.multiply[static_cast<std::size_t>(matrix.format())](product);
  FloatArray all({static_cast<py::ssize_t>(rows), static_cast<py::ssize_t>(matrix.outputs())});
  for (std::size_t i = 0; i < rows; ++i) {
    std::copy_n(y.data() + i * columns, matrix.outputs(),
                all.mutable_data(static_cast<py::ssize_t>(i)));
  }
  return all;
}

}  // namespace

void bind_engine(py::module_& m) {
  py::class_<Generation>(m, "Generation", "Generation of continuations for a batch of prompts")
      .def("read", &read_logits, py::arg("vocab_size"))
      .def("step", &step)
      .def("end", &Generation::end, py::arg("row"))
      .def("logprobs", &logprobs);
  py::class_<Engine, std::shared_ptr<Engine>>(m, "Engine", "GPT-2 inference on a CPU")
      .def(py::init(&make_engine), py::arg("config"), py::arg("dtype"), py::arg("group"),
           py::arg("threads"), py::arg("instruction_set"), py::arg("weights"))
      .def("generation", &make_generation, py::arg("prompts"), py::arg("copies"),
           py::arg("max_new_tokens"), py::arg("settings"), py::arg("seeds"),
           py::arg("stop").none(true), py::arg("with_logprobs"))
      .def("logits", &logits_of, py::arg("ids"))
      .def("matrix", &matrix_of, py::arg("name"))
      .def("vector", &vector_of, py::arg("name"))
      .def("multiply", &multiply_with, py::arg("name"), py::arg("x"), py::arg("rows"))
      .def_property_readonly("threads", [](const Engine& self) { return self.pool.size(); })
      .def_property_readonly("bytes_per_token",
                             [](const Engine& self) { return self.network.bytes_per_token(); });
  m.def("quantize", &quantize_weights, py::arg("weights"), py::arg("outputs"), py::arg("dtype"),
        py::arg("group"), py::arg("threads"), py::arg("name") = "weights");
  m.def("engine_instruction_sets", &engine::instruction_sets);
  m.attr("MOST_THREADS") = kMostThreads;
}

}  // namespace fastgpt
