// GPT-2 on a CPU: the network, and one pass of it over some tokens.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "engine/kernels.hpp"
#include "engine/thread_pool.hpp"
#include "engine/weights.hpp"
#include "tokenizer/lazy_array.hpp"

namespace fastgpt::engine {

struct Shape {
  std::size_t vocab_size = 0, block_size = 0, n_layer = 0, n_head = 0, n_embd = 0;
  float epsilon = 1e-5F;
  bool tied = true;
  std::size_t head_dim() const { return n_embd / n_head; }
};

// A matrix and what is added to its product, zeros where the model has nothing.
struct Linear {
  Matrix weight;
  std::vector<float> bias;  // for whole panels
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
  Network(const Network&) = delete;  // its matrices lie in its memory
  Network& operator=(const Network&) = delete;

  // Where a weight belongs by its name in a checkpoint (`h.0.attn.c_attn.weight`); null if it is
  // none of this network's.
  Linear* linear(const std::string& name);  // of its weight
  std::vector<float>* vector(const std::string& name);
  std::vector<std::string> matrix_names() const;
  std::vector<std::string> vector_names() const;

  const Linear& head() const { return shape.tied ? tokens : untied_head; }
  // The bytes of weights that a step reads for each token.
  std::size_t bytes_per_token() const;

  Shape shape;
  Format format;
  Linear tokens;  // of which rows are taken, too
  Linear untied_head;
  std::vector<float> positions;  // [block_size, n_embd]
  std::vector<Layer> layers;
  Norm last;

 private:
  // Of all matrices, in the order in which a step reads them: alone, many would be too small for
  // huge pages, without which memory is read at two thirds of its speed.
  std::unique_ptr<LazyArray<std::uint32_t>> memory_;
  void place_matrices();
};

// The keys and values of some rows of tokens, each with room for `capacity` positions.
class Cache {
 public:
  Cache(const Shape& shape, std::size_t rows, std::size_t capacity, bool bf16);
  HeadCache head(std::size_t layer, std::size_t row, std::size_t head) const;
  // Gives a row the first positions of another.
  void copy_row(std::size_t from, std::size_t to, std::size_t positions) const;
  std::size_t capacity() const { return capacity_; }

 private:
  std::size_t layers_, rows_, heads_, dimensions_, capacity_, value_stride_;
  bool bf16_;
  mutable LazyArray<std::uint16_t> memory_;
};

// A token to be read: at which position of which row. Those of a row come in order, one after the
// other, and what came before them is in the cache.
struct Token {
  std::size_t row, position;
  std::uint32_t id;
  bool wanted;  // whether the logits of what follows it are
};

constexpr std::size_t kMostTokens = 512;  // in one pass

// What a pass computes in: kept from one to the next.
class Workspace {
 public:
  Workspace(const Network& network, std::size_t threads);
  // Makes room for a pass over so many tokens, that attend to up to `positions`.
  void reserve(std::size_t tokens, std::size_t positions);

  struct Rows {  // of floats
    float* first = nullptr;
    std::size_t stride = 0;
    float* operator[](std::size_t i) const { return first + i * stride; }
  };
  struct InputRows {
    float* words = nullptr;
    std::int32_t* quads = nullptr;
    float* scales = nullptr;
    std::int32_t* sums = nullptr;
    std::size_t stride = 0;
  };

  Rows hidden, qkv, mixed, inner;
  InputRows shared;
  std::vector<InputRows> own;  // a thread's
  std::vector<float*> scores, normed;

 private:
  const Network& network_;
  std::size_t threads_, tokens_ = 0, positions_ = 0;
  std::vector<LazyArray<float>> memory_;
  std::vector<LazyArray<std::int32_t>> quads_;
  float* take(std::size_t floats);
  Rows take_rows(std::size_t rows, std::size_t columns);
  InputRows take_inputs(std::size_t rows);
};

// Reads up to kMostTokens tokens, and writes the logits behind those that are wanted to `logits`,
// [wanted, logits_stride], the stride a whole number of panels.
void run_pass(const Network& network, const Kernels& kernels, ThreadPool& pool,
              Workspace& workspace, const Cache& cache, const std::vector<Token>& tokens,
              float* logits, std::size_t logits_stride);

}  // namespace fastgpt::engine
