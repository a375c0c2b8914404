// The extension module fastgpt._C: tokenizer, text files, CRC-32C and GELU. The other bindings are
// in separate files (see bindings.hpp). Type stubs and documentation are in fastgpt/_C.pyi.
#include "python/bindings.hpp"

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

#include "common/crc32c.hpp"
#include "tokenizer/bpe.hpp"
#include "tokenizer/merges_file.hpp"
#include "tokenizer/pretokenizer.hpp"
#include "tokenizer/text_file.hpp"
#include "training/gelu.hpp"

namespace py = pybind11;

namespace fastgpt {

namespace {

// A special token in a text: the byte offsets of its begin and its end, and its id.
using SpecialSpan = std::tuple<std::size_t, std::size_t, TokenId>;

constexpr std::size_t kMaxNarrow = std::size_t{1} << 16;  // maximum size for 16-bit ids

// Returns a NumPy array that takes ownership of the ids' memory, without a copy.
template <typename Id>
py::array to_numpy(IdBuffer<Id> ids) {
  ids.shrink();
  auto owner = std::make_unique<IdBuffer<Id>>(std::move(ids));
  const auto size = static_cast<py::ssize_t>(owner->size());
  const Id* data = owner->data();
  const py::capsule free_when_done(owner.get(),
                                   [](void* buffer) { delete static_cast<IdBuffer<Id>*>(buffer); });
  static_cast<void>(owner.release());
  return py::array_t<Id>(size, data, free_when_done);
}

std::vector<Merge> to_merges(const IdArray& array) {
  if (array.ndim() != 2 || array.shape(1) != 3) {
    throw std::invalid_argument("merges must be an array of (left, right, merged) rows");
  }
  const auto rows = array.unchecked<2>();
  std::vector<Merge> merges;
  merges.reserve(static_cast<std::size_t>(rows.shape(0)));
  for (py::ssize_t i = 0; i < rows.shape(0); ++i) {
    merges.push_back({rows(i, 0), rows(i, 1), rows(i, 2)});
  }
  return merges;
}

// Returns a view of the UTF-8 bytes of a str or of the contents of a bytes object, valid as long as
// the object. Raises UnicodeEncodeError for a str with lone surrogates.
std::string_view utf8_of(const py::object& text) {
  py::ssize_t size = 0;
  if (PyUnicode_Check(text.ptr())) {
    const char* bytes = PyUnicode_AsUTF8AndSize(text.ptr(), &size);
    if (bytes == nullptr) throw py::error_already_set();
    return {bytes, static_cast<std::size_t>(size)};
  }
  char* bytes = nullptr;
  if (PyBytes_AsStringAndSize(text.ptr(), &bytes, &size) != 0) throw py::error_already_set();
  return {bytes, static_cast<std::size_t>(size)};
}

// Encodes a text with special tokens: the stretches between them are encoded, and each special
// token becomes its id. Releases the GIL.
template <typename Id>
IdBuffer<Id> encode_between(const BytePairEncoder& encoder, std::string_view text,
                            const std::vector<SpecialSpan>& specials, unsigned threads) {
  const py::gil_scoped_release unlocked;
  IdBuffer<Id> ids;
  ids.reserve(text.size() / 4 + 64);
  std::size_t at = 0;
  for (const auto& [begin, end, id] : specials) {
    if (begin < at || end < begin || end > text.size()) {
      throw std::invalid_argument("special tokens must be within the text, in ascending order");
    }
    encoder.encode(text.substr(at, begin - at), threads, ids);
    ids.append(&id, 1);
    at = end;
  }
  encoder.encode(text.substr(at), threads, ids);
  return ids;
}

// A cache of Python ints by value, for lists of ids: creating the ints would be most of the cost of
// creating a list.
class Numbers {
 public:
  explicit Numbers(std::size_t count) : numbers_(count) {}

  template <typename Ids>
  py::list list(const Ids& ids) {
    py::list list(ids.size());
    for (py::ssize_t i = 0; i < ids.size(); ++i) {
      const std::size_t id = ids.data()[i];
      if (!numbers_.at(id)) numbers_[id] = py::int_(id);
      PyList_SET_ITEM(list.ptr(), i, numbers_[id].inc_ref().ptr());
    }
    return list;
  }

 private:
  std::vector<py::object> numbers_;
};

// The class that Python sees as BytePairEncoder.
class Encoder {
 public:
  explicit Encoder(Vocabulary vocabulary)
      : encoder_(std::move(vocabulary)), numbers_(encoder_.vocabulary().tokens().size()) {}

  static std::unique_ptr<Encoder> make(const std::vector<py::bytes>& tokens,
                                       const IdArray& merges) {
    TokenBytes bytes;
    for (const py::bytes& token : tokens) bytes.push_back(std::string_view(token));
    return std::make_unique<Encoder>(Vocabulary(std::move(bytes), to_merges(merges)));
  }

  static std::unique_ptr<Encoder> from_merges_file(const py::bytes& file,
                                                   const std::vector<py::bytes>& specials,
                                                   bool trusted) {
    MergesFile parsed = parse_merges_file(file);
    for (const py::bytes& special : specials) parsed.tokens.push_back(std::string_view(special));
    if (!trusted) {
      return std::make_unique<Encoder>(
          Vocabulary(std::move(parsed.tokens), std::move(parsed.merges)));
    }
    return std::make_unique<Encoder>(
        Vocabulary(std::move(parsed.tokens), std::move(parsed.merges), std::move(parsed.index)));
  }

  py::array encode(const py::object& text, const std::vector<SpecialSpan>& specials,
                   unsigned threads) const {
    const std::string_view bytes = utf8_of(text);
    return narrow() ? to_numpy(encode_between<std::uint16_t>(encoder_, bytes, specials, threads))
                    : to_numpy(encode_between<std::uint32_t>(encoder_, bytes, specials, threads));
  }

  // Returns the ids as a list of ints. Requires an array that encode() returned.
  py::list to_list(const py::array& ids) {
    return narrow() ? numbers_.list(py::array_t<std::uint16_t, py::array::c_style>(ids))
                    : numbers_.list(IdArray(ids));
  }

  // Returns the decoded bytes, or None if `ids` is neither a list of ints nor a contiguous
  // one-dimensional array of a supported dtype, or contains an id that is out of range.
  py::object decode(const py::object& ids) const {
    if (PyList_CheckExact(ids.ptr())) return decode_list(ids);
    if (!py::isinstance<py::array>(ids)) return py::none();
    const auto array = py::reinterpret_borrow<py::array>(ids);
    if (array.ndim() != 1 || (array.flags() & py::array::c_style) == 0) return py::none();
    py::object bytes = py::none();
    static_cast<void>(
        decode_array<std::uint16_t>(array, bytes) || decode_array<std::uint32_t>(array, bytes) ||
        decode_array<std::int64_t>(array, bytes) || decode_array<std::int32_t>(array, bytes) ||
        decode_array<std::uint64_t>(array, bytes));
    return bytes;
  }

  const Vocabulary& vocabulary() const { return encoder_.vocabulary(); }

 private:
  bool narrow() const { return vocabulary().tokens().size() <= kMaxNarrow; }

  py::object decode_list(const py::object& list) const {
    std::vector<TokenId> ids(static_cast<std::size_t>(PyList_GET_SIZE(list.ptr())));
    for (std::size_t i = 0; i < ids.size(); ++i) {
      PyObject* item = PyList_GET_ITEM(list.ptr(), static_cast<py::ssize_t>(i));
      if (!PyLong_CheckExact(item)) return py::none();
      int overflow = 0;
      const long long id = PyLong_AsLongLongAndOverflow(item, &overflow);
      if (overflow != 0 || id < 0 || id >= static_cast<long long>(vocabulary().tokens().size())) {
        return py::none();
      }
      ids[i] = static_cast<TokenId>(id);
    }
    return decode_ids(ids.data(), ids.size());
  }

  // Decodes an array with elements of type Id into `bytes`. Returns false for any other dtype.
  template <typename Id>
  bool decode_array(const py::array& array, py::object& bytes) const {
    if (!py::isinstance<py::array_t<Id>>(array)) return false;
    bytes =
        decode_ids(static_cast<const Id*>(array.data()), static_cast<std::size_t>(array.size()));
    return true;
  }

  template <typename Id>
  py::object decode_ids(const Id* ids, std::size_t count) const {
    std::size_t size = 0;
    {
      const py::gil_scoped_release unlocked;
      size = encoder_.decoded_size(ids, count);
    }
    if (size == BytePairEncoder::kInvalid) return py::none();
    auto bytes = py::reinterpret_steal<py::object>(
        PyBytes_FromStringAndSize(nullptr, static_cast<py::ssize_t>(size)));
    if (!bytes) throw py::error_already_set();
    char* to = PyBytes_AS_STRING(bytes.ptr());
    const py::gil_scoped_release unlocked;
    encoder_.decode(ids, count, to, size);
    return bytes;
  }

  BytePairEncoder encoder_;
  Numbers numbers_;
};

py::list to_bytes_list(const TokenBytes& tokens) {
  py::list list;
  for (TokenId id = 0; id < tokens.size(); ++id) list.append(py::bytes(tokens[id]));
  return list;
}

std::tuple<py::list, IdArray> parse_merges(const py::bytes& file) {
  const MergesFile parsed = parse_merges_file(file);
  return {to_bytes_list(parsed.tokens), to_rows(parsed.merges)};
}

std::size_t valid_utf8_of(const py::bytes& text) {
  const std::string_view bytes = text;
  const py::gil_scoped_release unlocked;
  return valid_utf8(bytes);
}

py::bytes unix_newlines_of(const py::bytes& text) {
  const std::string_view bytes = text;
  std::unique_ptr<char[]> to;
  std::size_t size = 0;
  {
    const py::gil_scoped_release unlocked;
    to.reset(new char[bytes.size()]);  // make_unique would fill it with zeros first
    size = unix_newlines(bytes, to.get());
  }
  return {to.get(), size};
}

std::vector<std::size_t> piece_ends(const py::object& text, bool vectorized) {
  Pretokenizer pretokenizer(utf8_of(text), vectorized);
  std::vector<std::size_t> all;
  for (Ends ends = pretokenizer.next(); !ends.empty(); ends = pretokenizer.next()) {
    all.insert(all.end(), ends.begin(), ends.end());
  }
  return all;
}

// The contiguous buffer of a Python object, held until destruction. Raises BufferError or TypeError
// for other objects.
class ByteView {
 public:
  explicit ByteView(const py::object& owner) {
    if (PyObject_GetBuffer(owner.ptr(), &view_, PyBUF_SIMPLE) != 0) throw py::error_already_set();
  }
  ~ByteView() { PyBuffer_Release(&view_); }
  ByteView(const ByteView&) = delete;
  ByteView& operator=(const ByteView&) = delete;

  const unsigned char* data() const { return static_cast<const unsigned char*>(view_.buf); }
  std::size_t size() const { return static_cast<std::size_t>(view_.len); }

 private:
  Py_buffer view_{};
};

std::uint32_t crc32c_of(const py::object& data, std::uint32_t initial, bool hardware) {
  const ByteView bytes(data);
  const py::gil_scoped_release unlocked;
  return crc32c(bytes.data(), bytes.size(), initial, hardware);
}

using FloatArray = py::array_t<float, py::array::c_style>;

void require_size(const FloatArray& array, py::ssize_t size) {
  if (array.size() != size) throw std::invalid_argument("arrays must have the same size");
}

void gelu(const FloatArray& x, FloatArray& y, unsigned threads) {
  require_size(y, x.size());
  const float* from = x.data();
  float* to = y.mutable_data();
  const auto size = static_cast<std::size_t>(x.size());
  const py::gil_scoped_release unlocked;
  gelu_forward(from, to, size, threads);
}

void gelu_gradient(const FloatArray& grad, const FloatArray& x, FloatArray& grad_x,
                   unsigned threads) {
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

}  // namespace fastgpt

PYBIND11_MODULE(_C, m) {
  using fastgpt::Encoder;
  m.doc() = "Compiled extension of fastgpt: tokenizer, training kernels, CPU inference engine";
  m.attr("source_hash") = FASTGPT_SOURCE_HASH;

  py::class_<Encoder>(m, "BytePairEncoder", "Byte-pair encoding over an immutable vocabulary")
      .def(py::init(&Encoder::make), py::arg("tokens"), py::arg("merges"))
      .def_static("from_merges_file", &Encoder::from_merges_file, py::arg("file"),
                  py::arg("special_tokens"), py::arg("trusted") = false)
      .def("encode", &Encoder::encode, py::arg("text"),
           py::arg("specials") = std::vector<fastgpt::SpecialSpan>{}, py::arg("threads") = 1)
      .def("to_list", &Encoder::to_list, py::arg("ids"))
      .def("decode", &Encoder::decode, py::arg("ids"))
      .def("tokens",
           [](const Encoder& self) { return fastgpt::to_bytes_list(self.vocabulary().tokens()); })
      .def("merges",
           [](const Encoder& self) { return fastgpt::to_rows(self.vocabulary().merges()); })
      .def("__len__", [](const Encoder& self) { return self.vocabulary().tokens().size(); });
  m.def("parse_merges_file", &fastgpt::parse_merges, py::arg("file"));
  m.def("valid_utf8", &fastgpt::valid_utf8_of, py::arg("text"));
  m.def("unix_newlines", &fastgpt::unix_newlines_of, py::arg("text"));
  m.def("piece_ends", &fastgpt::piece_ends, py::arg("text"), py::arg("vectorized") = true);
  m.def("crc32c", &fastgpt::crc32c_of, py::arg("data"), py::arg("initial") = 0,
        py::arg("hardware") = true);
  fastgpt::bind_bpe_trainer(m);
  fastgpt::bind_engine(m);
  fastgpt::bind_gemm(m);
  fastgpt::bind_training(m);

  // noconvert: otherwise pybind11 could pass a converted copy, and the output array would not be
  // written.
  m.def("gelu_forward", &fastgpt::gelu, py::arg("x").noconvert(), py::arg("y").noconvert(),
        py::arg("threads"));
  m.def("gelu_backward", &fastgpt::gelu_gradient, py::arg("grad").noconvert(),
        py::arg("x").noconvert(), py::arg("grad_x").noconvert(), py::arg("threads"));
}
