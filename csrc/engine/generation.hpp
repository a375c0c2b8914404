// Text generation: rows of tokens, each with its own context window, seed and end.
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

// A network and its kernels, threads and buffers. The mutex serializes forward passes.
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

// Returns the start of the context window in a text of `length` tokens. When a text outgrows the
// context, its oldest tokens are dropped half a context at a time.
std::size_t window_start(std::size_t length, std::size_t block_size);

// The generation of continuations for a batch of prompts.
class Generation {
 public:
  using Ids = std::vector<std::uint32_t>;

  // prompts: must not be empty. copies: the number of consecutive rows for each prompt, which is
  // processed once for all of them. seeds: one for each row. stop: the token that ends a row.
  // with_logprobs: whether to compute the values of `logprob`.
  Generation(std::shared_ptr<Engine> engine, const std::vector<Ids>& prompts, std::size_t copies,
             std::size_t max_new_tokens, const Sampling& sampling,
             const std::vector<std::uint64_t>& seeds, std::optional<std::uint32_t> stop,
             bool with_logprobs);

  // Processes all tokens that are not in the cache yet, and returns the next-token logits of each
  // row that has not ended, in order and `logits_stride()` apart. They are valid until the next
  // call.
  float* read();
  std::size_t logits_stride() const { return stride_; }

  // Generates a token for each row and stores it in `tokens`; for a row that has ended, stores its
  // last token. Returns false, without storing anything, if all rows have ended or max_new_tokens
  // tokens have been generated.
  bool step(std::int64_t* tokens);

  // Ends a row: no more tokens are generated for it.
  void end(std::size_t row) { rows_.at(row).ended = true; }

  // Returns the log-probability of a row's last token in nats, under the model's own distribution:
  // before penalties, temperature and filters.
  double logprob(std::size_t row) const { return rows_.at(row).logprob; }

  std::size_t rows() const { return rows_.size(); }

 private:
  struct Row {
    Ids text;
    std::size_t start = 0, cached = 0;  // start of the window; positions in the cache
    Uniform uniform;
    std::optional<Counts> counts;
    bool ended = false;
    double logprob = 0.0;
  };

  std::vector<Token> uncached_tokens();
  void copy_first_rows();
  void sample(const std::vector<std::size_t>& rows);

  std::shared_ptr<Engine> engine_;
  std::vector<Row> rows_;
  std::size_t copies_;  // identical rows per prompt; 1 after the first `read`
  std::size_t left_;
  Sampling sampling_;
  std::optional<std::uint32_t> stop_;
  bool with_logprobs_;
  std::size_t stride_;
  Cache cache_;
  std::vector<float> logits_;
  std::vector<Sampler> samplers_;  // one for each thread
};

// Computes the next-token logits [tokens, vocab_size] at each token of a text, which must fit the
// context.
void all_logits(Engine& engine, const Generation::Ids& text, float* logits);

}  // namespace fastgpt::engine
