// GPT-2 inference on the CPU: the network, its KV cache, and a forward pass over a batch of tokens.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "common/lazy_array.hpp"
#include "common/matrix_view.hpp"
#include "engine/kernels.hpp"
#include "engine/thread_pool.hpp"
#include "engine/weights.hpp"

namespace fastgpt::engine {

// The model configuration. `tied`: the output projection shares the token embedding's weights.
struct Shape {
  std::size_t vocab_size = 0, block_size = 0, n_layer = 0, n_head = 0, n_embd = 0;
  float epsilon = 1e-5F;
  bool tied = true;
  std::size_t head_dim() const { return n_embd / n_head; }
};

// A linear layer. The bias is zero where the model has none.
struct Linear {
  Matrix weight;
  std::vector<float> bias;  // padded to whole panels
};

struct Norm {
  std::vector<float> gain, bias;
};

struct Layer {
  Norm before_attention, before_mlp;
  Linear qkv, attention_out, mlp_in, mlp_out;
};

struct Network {
  Network(const Shape& shape, Format format, std::size_t group);
  Network(const Network&) = delete;  // its matrices point into memory_
  Network& operator=(const Network&) = delete;

  // Return the layer or the vector of a parameter by its checkpoint name, such as
  // `h.0.attn.c_attn.weight`; null if the network has no such parameter.
  Linear* linear(const std::string& name);  // by the name of its weight
  std::vector<float>* vector(const std::string& name);
  std::vector<std::string> matrix_names() const;
  std::vector<std::string> vector_names() const;

  const Linear& head() const { return shape.tied ? tokens : untied_head; }
  // Returns the number of bytes of weights that generating one token reads.
  std::size_t bytes_per_token() const;

  Shape shape;
  Format format;
  Linear tokens;  // the token embedding, whose rows are also looked up
  Linear untied_head;
  std::vector<float> positions;  // [block_size, n_embd]
  std::vector<Layer> layers;
  Norm last;

 private:
  // One allocation for all matrices, in the order in which a step reads them. By themselves many
  // would be too small for huge pages, without which memory is read at two thirds of its speed.
  std::unique_ptr<LazyArray<std::uint32_t>> memory_;
  void place_matrices();
};

// The KV cache of `rows` sequences, each with room for `capacity` positions.
class Cache {
 public:
  Cache(const Shape& shape, std::size_t rows, std::size_t capacity, bool bf16);
  HeadCache head(std::size_t layer, std::size_t row, std::size_t head) const;
  // Copies the first `positions` positions of row `from` to row `to`, in all layers and heads.
  void copy_row(std::size_t from, std::size_t to, std::size_t positions) const;
  std::size_t capacity() const { return capacity_; }

 private:
  std::size_t layers_, rows_, heads_, dimensions_, capacity_, value_stride_;
  bool bf16_;
  mutable LazyArray<std::uint16_t> memory_;
};

// An input token of a forward pass, and its row and position. The tokens of a row must be
// consecutive and in order, and the positions before them must be in the cache.
struct Token {
  std::size_t row, position;
  std::uint32_t id;
  bool wanted;  // whether to compute its next-token logits
};

constexpr std::size_t kMostTokens = 512;  // per forward pass

// The buffers of activations, which are reused from one forward pass to the next.
class Workspace {
 public:
  Workspace(const Network& network, std::size_t threads);
  // Makes room for a pass over `tokens` tokens that attend to up to `positions` positions.
  void reserve(std::size_t tokens, std::size_t positions);

  using Rows = MatrixView<float*>;
  struct InputRows {
    float* words = nullptr;
    std::int32_t* quads = nullptr;
    float* scales = nullptr;
    std::int32_t* sums = nullptr;
    std::size_t stride = 0;
  };

  Rows hidden, qkv, mixed, inner;      // mixed: attention output; inner: MLP activations
  InputRows shared;                    // converted inputs that the threads prepare together
  std::vector<InputRows> own;          // converted inputs of each thread, for few tokens
  std::vector<float*> scores, normed;  // of each thread

 private:
  const Network& network_;
  std::size_t threads_, tokens_ = 0, positions_ = 0;
  std::vector<LazyArray<float>> memory_;
  std::vector<LazyArray<std::int32_t>> quads_;
  float* take(std::size_t floats);
  Rows take_rows(std::size_t rows, std::size_t columns);
  InputRows take_inputs(std::size_t rows);
};

// Runs a forward pass over up to kMostTokens tokens, adds their keys and values to the cache, and
// writes the logits of those that are wanted to `logits`, [wanted, logits_stride]. The stride is a
// whole number of panels, at least the head's.
void run_pass(const Network& network, const Kernels& kernels, ThreadPool& pool,
              Workspace& workspace, const Cache& cache, const std::vector<Token>& tokens,
              float* logits, std::size_t logits_stride);

}  // namespace fastgpt::engine
