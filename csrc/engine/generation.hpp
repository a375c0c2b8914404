// Writing text: rows of tokens, each with its own window, seed and end.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "engine/network.hpp"
#include "engine/sampling.hpp"

namespace fastgpt::engine {

// A network and what computes with it. One pass at a time: others wait.
struct Engine {
  Engine(const Shape& shape, Format format, std::size_t group, std::size_t threads,
         const Kernels& which)
      : network(shape, format, group), kernels(which), pool(threads), workspace(network, threads) {}

  Network network;
  Kernels kernels;
  ThreadPool pool;
  Workspace workspace;
  std::mutex mutex;
};

// Where the visible part of a text of `length` tokens begins. When a text outgrows the context, its
// oldest tokens fall away half a context at a time.
std::size_t window_start(std::size_t length, std::size_t block_size);

// Some prompts and what is written behind them.
class Generation {
 public:
  using Ids = std::vector<std::uint32_t>;

  // copies: rows of each prompt, which follow one another; it is read once for all of them. seeds:
  // one for each row. stop: the token that ends a row. with_logprobs: whether `logprob` will be
  // asked. Prompts are not empty.
  Generation(std::shared_ptr<Engine> engine, const std::vector<Ids>& prompts, std::size_t copies,
             std::size_t max_new_tokens, const Sampling& sampling,
             const std::vector<std::uint64_t>& seeds, std::optional<std::uint32_t> stop,
             bool with_logprobs);

  // Reads what is not yet read, and returns the logits behind each row that has not ended, in
  // order: `logits_stride()` apart. They stay until the next call.
  float* read();
  std::size_t logits_stride() const { return stride_; }

  // Writes a token for each row to `tokens`: in a row that has ended, its last. Returns false, and
  // writes nothing, if all have ended or all tokens are written.
  bool step(std::int64_t* tokens);

  // Ends a row: nothing more is computed for it.
  void end(std::size_t row) { rows_.at(row).ended = true; }

  // How likely the network itself found a row's last token, before penalties and the like, in nats.
  double logprob(std::size_t row) const { return rows_.at(row).logprob; }

  std::size_t rows() const { return rows_.size(); }

 private:
  struct Row {
    Ids text;
    std::size_t start = 0, cached = 0;  // of the window; positions in the cache
    Uniform uniform;
    std::optional<Counts> counts;
    bool ended = false;
    double logprob = 0.0;
  };

  std::vector<Token> unread();
  void copy_first_rows();
  void sample(const std::vector<std::size_t>& rows);

  std::shared_ptr<Engine> engine_;
  std::vector<Row> rows_;
  std::size_t copies_;  // rows that are still alike; from the first reading on, 1
  std::size_t left_;
  Sampling sampling_;
  std::optional<std::uint32_t> stop_;
  bool with_logprobs_;
  std::size_t stride_;
  Cache cache_;
  std::vector<float> logits_;
  std::vector<Sampler> samplers_;  // of each thread
};

// The logits behind each token of a text that fits the context, [tokens, vocab_size].
void all_logits(Engine& engine, const Generation::Ids& text, float* logits);

}  // namespace fastgpt::engine
