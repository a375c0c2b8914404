// What Python sees of csrc/, as fastgpt._C; typed in fastgpt/_C.pyi.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "bpe.hpp"
#include "gelu.hpp"
#include "merges_file.hpp"

namespace py = pybind11;

namespace fastgpt {

void bind_bpe_trainer(py::module_& m);  // in bpe_trainer_bindings.cpp

namespace {

using IdArray = py::array_t<TokenId, py::array::c_style>;
// A special token in the text: its first byte, the byte after its last, and its id.
using SpecialSpan = std::tuple<std::size_t, std::size_t, TokenId>;

// Hands the ids to NumPy without copying them.
IdArray to_numpy(std::vector<TokenId> ids) {
  auto owner = std::make_unique<std::vector<TokenId>>(std::move(ids));
  const auto size = static_cast<py::ssize_t>(owner->size());
  const TokenId* data = owner->data();
  const py::capsule free_when_done(
      owner.get(), [](void* vector) { delete static_cast<std::vector<TokenId>*>(vector); });
  owner.release();
  return IdArray(size, data, free_when_done);
}

std::unique_ptr<BytePairEncoder> make_encoder(const std::vector<std::string>& tokens,
                                              const IdArray& merges) {
  if (merges.ndim() != 2 || merges.shape(1) != 3) {
    throw std::invalid_argument("merges must be an array of (left, right, merged) rows");
  }
  const auto rows = merges.unchecked<2>();
  std::vector<Merge> list;
  list.reserve(static_cast<std::size_t>(rows.shape(0)));
  for (py::ssize_t i = 0; i < rows.shape(0); ++i) {
    list.push_back({rows(i, 0), rows(i, 1), rows(i, 2)});
  }
  return std::make_unique<BytePairEncoder>(tokens, std::move(list));
}

// Encodes what lies between the special tokens, and puts their ids in its place.
IdArray encode(const BytePairEncoder& encoder, const py::bytes& text,
               const std::vector<SpecialSpan>& specials) {
  const std::string_view bytes = text;
  std::vector<TokenId> ids;
  {
    const py::gil_scoped_release unlocked;
    ids.reserve(bytes.size() / 4 + 8);
    std::size_t at = 0;
    for (const auto& [begin, end, id] : specials) {
      if (begin < at || end < begin || end > bytes.size()) {
        throw std::invalid_argument("special tokens must lie in the text, in order");
      }
      encoder.encode(bytes.substr(at, begin - at), ids);
      ids.push_back(id);
      at = end;
    }
    encoder.encode(bytes.substr(at), ids);
  }
  return to_numpy(std::move(ids));
}

py::bytes decode(const BytePairEncoder& encoder, const IdArray& ids) {
  const TokenId* data = ids.data();
  const auto count = static_cast<std::size_t>(ids.size());
  std::string bytes;
  {
    const py::gil_scoped_release unlocked;
    bytes = encoder.decode(data, count);
  }
  return py::bytes(bytes);
}

template <typename Tokens>
std::vector<py::bytes> to_bytes_list(const Tokens& tokens) {
  std::vector<py::bytes> list;
  list.reserve(tokens.size());
  for (TokenId id = 0; id < tokens.size(); ++id) list.emplace_back(tokens[id]);
  return list;
}

IdArray to_rows(const std::vector<Merge>& merges) {
  IdArray array({static_cast<py::ssize_t>(merges.size()), py::ssize_t{3}});
  auto rows = array.mutable_unchecked<2>();
  py::ssize_t i = 0;
  for (const auto& [left, right, merged] : merges) {
    rows(i, 0) = left;
    rows(i, 1) = right;
    rows(i, 2) = merged;
    ++i;
  }
  return array;
}

std::tuple<std::vector<py::bytes>, IdArray> parse_merges(const py::bytes& file) {
  const MergesFile parsed = parse_merges_file(file);
  return {to_bytes_list(parsed.tokens), to_rows(parsed.merges)};
}

using Floats = py::array_t<float, py::array::c_style>;

void require_size(const Floats& array, py::ssize_t size) {
  if (array.size() != size) throw std::invalid_argument("arrays must be of one size");
}

void gelu(const Floats& x, Floats& y, unsigned threads) {
  require_size(y, x.size());
  const float* from = x.data();
  float* to = y.mutable_data();
  const auto size = static_cast<std::size_t>(x.size());
  const py::gil_scoped_release unlocked;
  gelu_forward(from, to, size, threads);
}

void gelu_gradient(const Floats& grad, const Floats& x, Floats& grad_x, unsigned threads) {
  require_size(grad, x.size());
  require_size(grad_x, x.size());
  const float* from = grad.data();
  const float* at = x.data();
  float* to = grad_x.mutable_data();
  const auto size = static_cast<std::size_t>(x.size());
  const py::gil_scoped_release unlocked;
  gelu_backward(from, at, to, size, threads);
}

}  // namespace
}  // namespace fastgpt

PYBIND11_MODULE(_C, m) {
  using fastgpt::BytePairEncoder;
  using fastgpt::to_bytes_list;
  using fastgpt::to_rows;
  m.doc() = "The compiled part of fastgpt: the tokenizer's core, and GELU for CPUs";
  m.attr("source_hash") = FASTGPT_SOURCE_HASH;

  py::class_<BytePairEncoder>(m, "BytePairEncoder",
                              "Byte-pair encoding over an immutable vocabulary")
      .def(py::init(&fastgpt::make_encoder), py::arg("tokens"), py::arg("merges"))
      .def("encode", &fastgpt::encode, py::arg("text"),
           py::arg("specials") = std::vector<fastgpt::SpecialSpan>{})
      .def("decode", &fastgpt::decode, py::arg("ids"))
      .def("tokens", [](const BytePairEncoder& self) { return to_bytes_list(self.tokens()); })
      .def("merges", [](const BytePairEncoder& self) { return to_rows(self.merges()); })
      .def("__len__", [](const BytePairEncoder& self) { return self.tokens().size(); });
  m.def("parse_merges_file", &fastgpt::parse_merges, py::arg("file"));
  fastgpt::bind_bpe_trainer(m);

  // Arrays are taken as they are or not at all: a silent copy would leave the output unwritten.
  m.def("gelu_forward", &fastgpt::gelu, py::arg("x").noconvert(), py::arg("y").noconvert(),
        py::arg("threads"));
  m.def("gelu_backward", &fastgpt::gelu_gradient, py::arg("grad").noconvert(),
        py::arg("x").noconvert(), py::arg("grad_x").noconvert(), py::arg("threads"));
}
