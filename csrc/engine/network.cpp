#include "engine/network.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "common/arithmetic.hpp"
#include "common/bfloat16.hpp"

namespace fastgpt::engine {
namespace {

constexpr std::size_t kCacheLine = 16;  // words or floats

Linear make_linear(Format format, std::size_t outputs, std::size_t inputs, std::size_t group) {
  return {Matrix(format, outputs, inputs, group), std::vector<float>(round_up(outputs, kPanel))};
}

}  // namespace

Network::Network(const Shape& of, Format stored, std::size_t group) : shape(of), format(stored) {
  const std::size_t width = shape.n_embd;
  // In int4, the token embedding and the output projection stay at 8 bits, since they are the most
  // sensitive to quantization.
  const Format ends = format == Format::kInt4 ? Format::kInt8 : format;
  tokens = make_linear(ends, shape.vocab_size, width, group);
  if (!shape.tied) untied_head = make_linear(ends, shape.vocab_size, width, group);
  positions.resize(shape.block_size * width);
  const Norm norm{std::vector<float>(width), std::vector<float>(width)};
  last = norm;
  layers.reserve(shape.n_layer);
  for (std::size_t i = 0; i < shape.n_layer; ++i) {
    layers.push_back({norm, norm, make_linear(format, 3 * width, width, group),
                      make_linear(format, width, width, group),
                      make_linear(format, 4 * width, width, group),
                      make_linear(format, width, 4 * width, group)});
  }
  place_matrices();
}

void Network::place_matrices() {
  std::vector<Matrix*> matrices;
  for (const std::string& name : matrix_names()) matrices.push_back(&linear(name)->weight);
  std::size_t words = 0;
  for (const Matrix* matrix : matrices) words += round_up(matrix->memory_words(), kCacheLine);
  constexpr std::size_t kPageWords = kHugePage / sizeof(std::uint32_t);
  // Round up, so that the last part is in a huge page as well.
  if (words > kPageWords) words = round_up(words, kPageWords);
  memory_ = std::make_unique<LazyArray<std::uint32_t>>(words);
  std::uint32_t* place = memory_->data();
  for (Matrix* matrix : matrices) {
    matrix->place(place);
    place += round_up(matrix->memory_words(), kCacheLine);
  }
}

std::vector<std::string> Network::matrix_names() const {
  std::vector<std::string> names{"wte.weight"};
  if (!shape.tied) names.emplace_back("lm_head.weight");
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const std::string prefix = "h." + std::to_string(i) + ".";
    for (const char* name : {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}) {
      names.push_back(prefix + name + ".weight");
    }
  }
  return names;
}

std::vector<std::string> Network::vector_names() const {
  std::vector<std::string> names{"wpe.weight", "ln_f.weight", "ln_f.bias"};
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const std::string prefix = "h." + std::to_string(i) + ".";
    for (const char* name :
         {"ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias", "attn.c_attn.bias",
          "attn.c_proj.bias", "mlp.c_fc.bias", "mlp.c_proj.bias"}) {
      names.push_back(prefix + name);
    }
  }
  return names;
}

namespace {

// Removes a prefix such as "h.3." from a name, and returns that layer; null if there is no such
// prefix or layer.
template <typename Layers>
auto take_layer(Layers& layers, std::string& name) -> decltype(layers.data()) {
  if (name.rfind("h.", 0) != 0) return nullptr;
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const std::string prefix = "h." + std::to_string(i) + ".";
    if (name.rfind(prefix, 0) == 0) {
      name = name.substr(prefix.size());
      return &layers[i];
    }
  }
  return nullptr;
}

}  // namespace

Linear* Network::linear(const std::string& name) {
  if (name == "wte.weight") return &tokens;
  if (name == "lm_head.weight" && !shape.tied) return &untied_head;
  std::string rest = name;
  Layer* layer = take_layer(layers, rest);
  if (layer == nullptr) return nullptr;
  if (rest == "attn.c_attn.weight") return &layer->qkv;
  if (rest == "attn.c_proj.weight") return &layer->attention_out;
  if (rest == "mlp.c_fc.weight") return &layer->mlp_in;
  if (rest == "mlp.c_proj.weight") return &layer->mlp_out;
  return nullptr;
}

std::vector<float>* Network::vector(const std::string& name) {
  if (name == "wpe.weight") return &positions;
  if (name == "ln_f.weight") return &last.gain;
  if (name == "ln_f.bias") return &last.bias;
  std::string rest = name;
  Layer* layer = take_layer(layers, rest);
  if (layer == nullptr) return nullptr;
  if (rest == "ln_1.weight") return &layer->before_attention.gain;
  if (rest == "ln_1.bias") return &layer->before_attention.bias;
  if (rest == "ln_2.weight") return &layer->before_mlp.gain;
  if (rest == "ln_2.bias") return &layer->before_mlp.bias;
  if (rest == "attn.c_attn.bias") return &layer->qkv.bias;
  if (rest == "attn.c_proj.bias") return &layer->attention_out.bias;
  if (rest == "mlp.c_fc.bias") return &layer->mlp_in.bias;
  if (rest == "mlp.c_proj.bias") return &layer->mlp_out.bias;
  return nullptr;
}

std::size_t Network::bytes_per_token() const {
  std::size_t bytes = head().weight.bytes();
  for (const Layer& layer : layers) {
    bytes += layer.qkv.weight.bytes() + layer.attention_out.weight.bytes() +
             layer.mlp_in.weight.bytes() + layer.mlp_out.weight.bytes();
  }
  return bytes;
}

// --- KV cache ------------------------------------------------------------------------------------

// The memory is in units of 16 bits, one for a bfloat16 number and two for a float. Each head of a
// row in a layer has its keys, then its values.
Cache::Cache(const Shape& shape, std::size_t rows, std::size_t capacity, bool bf16)
    : layers_(shape.n_layer),
      rows_(rows),
      heads_(shape.n_head),
      dimensions_(shape.head_dim()),
      capacity_(round_up(capacity, kKeysAtOnce)),
      value_stride_(round_up(shape.head_dim(), 16)),
      bf16_(bf16),
      memory_(shape.n_layer * rows * heads_ * capacity_ * (dimensions_ + value_stride_) *
              (bf16 ? 1 : 2)) {}

HeadCache Cache::head(std::size_t layer, std::size_t row, std::size_t head) const {
  const std::size_t number = bf16_ ? 1 : 2;
  const std::size_t index = (layer * rows_ + row) * heads_ + head;
  std::uint16_t* keys = memory_.data() + index * capacity_ * (dimensions_ + value_stride_) * number;
  return {keys, keys + capacity_ * dimensions_ * number, bf16_, dimensions_, value_stride_};
}

void Cache::copy_row(std::size_t from, std::size_t to, std::size_t positions) const {
  const std::size_t number = bf16_ ? sizeof(Bfloat16) : sizeof(float);
  const std::size_t keys = round_up(positions, kKeys) * dimensions_ * number;
  const std::size_t values = positions * value_stride_ * number;
  for (std::size_t i = 0; i < layers_ * heads_; ++i) {
    const HeadCache source = head(i / heads_, from, i % heads_);
    const HeadCache target = head(i / heads_, to, i % heads_);
    std::memcpy(target.keys, source.keys, keys);
    std::memcpy(target.values, source.values, values);
  }
}

// --- workspace -----------------------------------------------------------------------------------

namespace {

constexpr std::size_t kFewTokens = 3;  // with fewer, each thread converts all inputs for itself
constexpr std::size_t kSmallestGroup = 32;

}  // namespace

Workspace::Workspace(const Network& network, std::size_t threads)
    : network_(network), threads_(threads) {}

void Workspace::reserve(std::size_t tokens, std::size_t positions) {
  if (tokens <= tokens_ && positions <= positions_) return;
  tokens = std::max(tokens, tokens_);
  positions = round_up(std::max(positions, positions_), kKeysAtOnce);
  tokens_ = positions_ = 0;  // stays so if an allocation below throws
  memory_.clear();
  quads_.clear();
  const std::size_t width = network_.shape.n_embd;
  hidden = take_rows(tokens, width);
  qkv = take_rows(tokens, 3 * width);
  mixed = take_rows(tokens, width);
  inner = take_rows(tokens, 4 * width);
  shared = take_inputs(tokens);
  own.clear();
  scores.clear();
  normed.clear();
  for (std::size_t i = 0; i < threads_; ++i) {
    own.push_back(take_inputs(kFewTokens));
    scores.push_back(take(kQueries * (positions + kKeysAtOnce)));
    normed.push_back(take(width));
  }
  tokens_ = tokens;
  positions_ = positions;
}

float* Workspace::take(std::size_t floats) {
  memory_.emplace_back(round_up(floats, kCacheLine));
  return memory_.back().data();
}

// The stride has an extra cache line, so that it is not a power of two: such rows would map to few
// cache sets.
Workspace::Rows Workspace::take_rows(std::size_t rows, std::size_t columns) {
  const std::size_t stride = round_up(columns, kPanel) + kCacheLine;
  return {take(rows * stride), stride};
}

Workspace::InputRows Workspace::take_inputs(std::size_t rows) {
  const std::size_t widest = 4 * network_.shape.n_embd;
  InputRows inputs;
  if (!is_integer(network_.format)) {
    inputs.stride = round_up(widest, kPanel) + kCacheLine;
    inputs.words = take(rows * inputs.stride);
    return inputs;
  }
  inputs.stride = round_up(widest, kInt8Group) / 4 + kCacheLine;
  const std::size_t groups = rows * (widest / kSmallestGroup + 1);
  inputs.scales = take(groups);
  quads_.emplace_back(rows * inputs.stride);
  inputs.quads = quads_.back().data();
  quads_.emplace_back(groups);
  inputs.sums = quads_.back().data();
  return inputs;
}

// --- forward pass --------------------------------------------------------------------------------

namespace {

// Consecutive tokens of one row.
struct Segment {
  std::size_t first, count, row, position;
};

std::vector<Segment> segments_of(const std::vector<Token>& tokens) {
  std::vector<Segment> segments;
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    const bool continues = i > 0 && tokens[i].row == tokens[i - 1].row &&
                           tokens[i].position == tokens[i - 1].position + 1;
    if (continues) {
      ++segments.back().count;
    } else {
      segments.push_back({i, 1, tokens[i].row, tokens[i].position});
    }
  }
  return segments;
}

// A forward pass, which every thread of the pool runs with its own rank. Each step is divided among
// the threads. They meet at `barrier_wait` after every step whose results other threads read, or
// whose inputs the next step overwrites.
class Pass {
 public:
  Pass(const Network& network, const Kernels& kernels, ThreadPool& pool, const Workspace& workspace,
       const Cache& cache, const std::vector<Token>& tokens, float* logits,
       std::size_t logits_stride)
      : net_(network),
        kernels_(kernels),
        pool_(pool),
        work_(workspace),
        cache_(cache),
        tokens_(tokens),
        segments_(segments_of(tokens)),
        logits_{logits, logits_stride} {
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      if (tokens[i].wanted) wanted_.push_back(i);
    }
  }

  void run(std::size_t rank) const {
    embed(rank);
    pool_.barrier_wait();
    for (std::size_t i = 0; i < net_.layers.size(); ++i) run_layer(rank, i);
    if (wanted_.empty()) return;
    const Linear& head = net_.head();
    const Inputs x = prepare_norm(rank, head.weight, net_.last, &wanted_);
    multiply(rank, head, x, wanted_.size(), logits_, Finish::kStore);
  }

 private:
  using Rows = Workspace::Rows;

  // qkv, attention, its output projection and the MLP, each on the residual stream `hidden`.
  void run_layer(std::size_t rank, std::size_t index) const {
    const Layer& layer = net_.layers[index];
    const std::size_t n = tokens_.size();
    Inputs x = prepare_norm(rank, layer.qkv.weight, layer.before_attention, nullptr);
    multiply(rank, layer.qkv, x, n, work_.qkv, Finish::kStore);
    pool_.barrier_wait();
    attend(rank, index);
    pool_.barrier_wait();
    x = prepare_rows(rank, layer.attention_out.weight, work_.mixed);
    multiply(rank, layer.attention_out, x, n, work_.hidden, Finish::kAdd);
    pool_.barrier_wait();
    x = prepare_norm(rank, layer.mlp_in.weight, layer.before_mlp, nullptr);
    multiply(rank, layer.mlp_in, x, n, work_.inner, Finish::kGelu);
    pool_.barrier_wait();
    x = prepare_rows(rank, layer.mlp_out.weight, work_.inner);
    multiply(rank, layer.mlp_out, x, n, work_.hidden, Finish::kAdd);
    pool_.barrier_wait();
  }

  void embed(std::size_t rank) const {
    const std::size_t width = net_.shape.n_embd;
    const Range mine = share(tokens_.size(), rank);
    for (std::size_t i = mine.begin; i < mine.end; ++i) {
      float* x = work_.hidden[i];
      net_.tokens.weight.read_row(tokens_[i].id, x);
      const float* position = net_.positions.data() + tokens_[i].position * width;
      for (std::size_t k = 0; k < width; ++k) x[k] += position[k];
    }
  }

  // Returns this thread's contiguous share of n items.
  Range share(std::size_t n, std::size_t rank) const { return share_of(n, rank, pool_.size()); }

  // Converts rows of inputs for `matrix`, by put(row, destination). If there are few rows, each
  // thread converts all of them into its own buffer, which saves a barrier; otherwise each converts
  // its share, into a shared buffer.
  template <typename Put>
  Inputs prepare(std::size_t rank, const Matrix& matrix, std::size_t rows, const Put& put) const {
    const bool few = rows < kFewTokens;
    const Workspace::InputRows& to = few ? work_.own[rank] : work_.shared;
    const Range mine = few ? Range{0, rows} : share(rows, rank);
    for (std::size_t i = mine.begin; i < mine.end; ++i) put(i, row_of(to, i, matrix));
    if (!few) pool_.barrier_wait();
    return {to.words, to.quads, to.stride, to.scales, to.sums};
  }

  static InputRow row_of(const Workspace::InputRows& rows, std::size_t i, const Matrix& matrix) {
    if (!is_integer(matrix.format()))
      return {rows.words + i * rows.stride, nullptr, nullptr, nullptr};
    const std::size_t group = i * matrix.groups();
    return {nullptr, rows.quads + i * rows.stride, rows.scales + group, rows.sums + group};
  }

  // Converts rows of floats to inputs; in kFloat32 they are used as they are.
  Inputs prepare_rows(std::size_t rank, const Matrix& matrix, const Rows& rows) const {
    if (matrix.format() == Format::kFloat32) {
      return {rows.first, nullptr, rows.stride, nullptr, nullptr};
    }
    return prepare(rank, matrix, tokens_.size(), [&](std::size_t i, const InputRow& to) {
      kernels_.prepare(matrix.format(), matrix.group(), rows[i], matrix.inputs(), to);
    });
  }

  // Normalizes hidden states and converts them to inputs: all of them, or those listed in `which`.
  Inputs prepare_norm(std::size_t rank, const Matrix& matrix, const Norm& norm,
                      const std::vector<std::size_t>* which) const {
    const std::size_t width = net_.shape.n_embd;
    const std::size_t rows = which == nullptr ? tokens_.size() : which->size();
    return prepare(rank, matrix, rows, [&](std::size_t i, const InputRow& to) {
      const float* x = work_.hidden[which == nullptr ? i : (*which)[i]];
      const bool floats = matrix.format() == Format::kFloat32;
      float* y = floats ? to.words : work_.normed[rank];
      kernels_.layer_norm(x, norm.gain.data(), norm.bias.data(), net_.shape.epsilon, width, y);
      if (!floats) kernels_.prepare(matrix.format(), matrix.group(), y, width, to);
    });
  }

  // Computes y = x · Wᵀ + bias with an epilogue. The work is divided into pairs of a chunk of up to
  // kRowsAtOnce rows and a panel, ordered by chunk, then by panel. A thread's share is a contiguous
  // range of these, which takes one kernel call for each chunk that it touches.
  void multiply(std::size_t rank, const Linear& linear, const Inputs& x, std::size_t rows,
                const Rows& y, Finish finish) const {
    const std::size_t panels = linear.weight.panels();
    const std::size_t chunks = ceil_div(rows, kRowsAtOnce);
    Product product = linear.weight.product(linear.bias.data());
    product.x = x;
    product.y = y.first;
    product.y_stride = y.stride;
    product.finish = finish;
    const auto kernel = kernels_.multiply[static_cast<std::size_t>(product.format)];
    const Range mine = share(chunks * panels, rank);
    for (std::size_t i = mine.begin; i < mine.end;) {
      const std::size_t chunk = i / panels, panel = i % panels;
      const std::size_t end = std::min(panels, panel + mine.end - i);
      product.rows = share_of(rows, chunk, chunks);
      product.panels = {panel, end};
      kernel(product);
      i += end - panel;
    }
  }

  // Divides pairs of a segment and a head among the threads.
  void attend(std::size_t rank, std::size_t layer) const {
    const std::size_t heads = net_.shape.n_head;
    const Range mine = share(segments_.size() * heads, rank);
    for (std::size_t i = mine.begin; i < mine.end; ++i) {
      attend_segment(rank, layer, segments_[i / heads], i % heads);
    }
  }

  // Adds a segment's keys and values of one head to the cache, then computes its attention.
  void attend_segment(std::size_t rank, std::size_t layer, const Segment& segment,
                      std::size_t head) const {
    const std::size_t width = net_.shape.n_embd, size = net_.shape.head_dim();
    const HeadCache cache = cache_.head(layer, segment.row, head);
    for (std::size_t i = 0; i < segment.count; ++i) {
      const float* key = work_.qkv[segment.first + i] + width + head * size;
      kernels_.append(cache, segment.position + i, key, key + width);
    }
    Attention attention;
    attention.head = cache;
    attention.queries = work_.qkv[segment.first] + head * size;
    attention.stride = work_.qkv.stride;
    attention.count = segment.count;
    attention.visible = segment.position + 1;
    attention.scale = 1.0F / std::sqrt(static_cast<float>(size));
    attention.scores = work_.scores[rank];
    attention.out = work_.mixed[segment.first] + head * size;
    attention.out_stride = work_.mixed.stride;
    kernels_.attend(attention);
  }

  const Network& net_;
  const Kernels& kernels_;
  ThreadPool& pool_;
  const Workspace& work_;
  const Cache& cache_;
  const std::vector<Token>& tokens_;
  const std::vector<Segment> segments_;
  const Rows logits_;
  std::vector<std::size_t> wanted_;
};

}  // namespace

void run_pass(const Network& network, const Kernels& kernels, ThreadPool& pool,
              Workspace& workspace, const Cache& cache, const std::vector<Token>& tokens,
              float* logits, std::size_t logits_stride) {
  std::size_t positions = 0;
  for (const Token& token : tokens) positions = std::max(positions, token.position + 1);
  workspace.reserve(tokens.size(), positions);
  const Pass pass(network, kernels, pool, workspace, cache, tokens, logits, logits_stride);
  pool.run([&](std::size_t rank) { pass.run(rank); });
}

}  // namespace fastgpt::engine
