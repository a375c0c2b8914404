// Python bindings of tokenizer/bpe_trainer.hpp.
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "python/bindings.hpp"
#include "tokenizer/bpe_trainer.hpp"

namespace py = pybind11;

namespace fastgpt {
namespace {

constexpr std::chrono::milliseconds kBetweenSignalChecks{50};

void feed(BpeTrainer& trainer, const py::bytes& block) {
  const std::string_view bytes = block;
  const py::gil_scoped_release unlocked;
  trainer.feed(bytes);
}

void end_text(BpeTrainer& trainer) {
  const py::gil_scoped_release unlocked;
  trainer.end_text();
}

// Makes up to `n_merges` merges and returns their number. Runs without the GIL, but checks for
// signals regularly, so that Ctrl-C interrupts it.
std::size_t train(BpeTrainer& trainer, std::size_t n_merges, std::uint64_t min_count) {
  using Clock = std::chrono::steady_clock;
  const py::gil_scoped_release unlocked;
  Clock::time_point checked = Clock::now();
  std::size_t made = 0;
  while (made < n_merges && trainer.merge_next(min_count)) {
    ++made;
    if (Clock::now() - checked < kBetweenSignalChecks) continue;
    const py::gil_scoped_acquire locked;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    checked = Clock::now();
  }
  return made;
}

}  // namespace

void bind_bpe_trainer(py::module_& m) {
  py::class_<BpeTrainer>(m, "BpeTrainer", "Learns the merges of a byte-pair encoding from text")
      .def(py::init<unsigned>(), py::arg("threads") = 1)
      .def("feed", &feed, py::arg("block"))
      .def("end_text", &end_text)
      .def_property_readonly("n_pieces", &BpeTrainer::n_pieces)
      .def("train", &train, py::arg("n_merges"), py::arg("min_count"))
      .def("merges", [](const BpeTrainer& self) { return to_rows(self.merges()); });
}

}  // namespace fastgpt
