#include "engine/generation.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <utility>

namespace fastgpt::engine {
namespace {

std::size_t longest(const std::vector<Generation::Ids>& prompts) {
  std::size_t most = 0;
  for (const auto& prompt : prompts) most = std::max(most, prompt.size());
  return most;
}

// Returns the number of cache positions to allocate. `new_tokens` may be any number: it is limited
// before the addition, which could overflow.
std::size_t positions_needed(const Shape& shape, std::size_t prompt, std::size_t new_tokens) {
  return std::min(prompt + std::min(new_tokens, shape.block_size), shape.block_size);
}

double log_sum_of_exponentials(const std::vector<float>& logits) {
  const float largest = *std::max_element(logits.begin(), logits.end());
  double sum = 0.0;
  for (const float logit : logits) sum += std::exp(logit - largest);
  return largest + std::log(sum);
}

std::size_t logits_per_row(const Network& network) {
  return network.head().weight.panels() * kPanel;
}

}  // namespace

std::size_t window_start(std::size_t length, std::size_t block_size) {
  if (length <= block_size) return 0;
  const std::size_t stride = (block_size + 1) / 2;
  return (length - block_size + stride - 1) / stride * stride;
}

Generation::Generation(std::shared_ptr<Engine> engine, const std::vector<Ids>& prompts,
                       std::size_t copies, std::size_t max_new_tokens, const Sampling& sampling,
                       const std::vector<std::uint64_t>& seeds, std::optional<std::uint32_t> stop,
                       bool with_logprobs)
    : engine_(std::move(engine)),
      copies_(copies),
      left_(max_new_tokens),
      sampling_(sampling),
      stop_(stop),
      with_logprobs_(with_logprobs),
      stride_(logits_per_row(engine_->network)),
      cache_(engine_->network.shape, prompts.size() * copies,
             positions_needed(engine_->network.shape, longest(prompts), max_new_tokens),
             engine_->network.format != Format::kFloat32),
      logits_(prompts.size() * copies * stride_),
      samplers_(engine_->pool.size()) {
  rows_.reserve(prompts.size() * copies);
  for (std::size_t i = 0; i < prompts.size() * copies; ++i) {
    Row row{prompts[i / copies], 0, 0, Uniform(seeds[i]), std::nullopt, false, 0.0};
    if (sampling.has_penalties()) {
      row.counts.emplace(engine_->network.shape.vocab_size);
      for (const std::uint32_t token : row.text) row.counts->add(token, false);
    }
    rows_.push_back(std::move(row));
  }
}

// Returns the tokens that are not in the cache, and marks them as cached. If a row's window has
// moved, all of its positions have changed, and the whole window is processed again.
std::vector<Token> Generation::uncached_tokens() {
  std::vector<Token> tokens;
  for (std::size_t r = 0; r < rows_.size(); ++r) {
    Row& row = rows_[r];
    if (row.ended) continue;
    const std::size_t start = window_start(row.text.size(), engine_->network.shape.block_size);
    if (start != row.start) row.cached = 0;
    row.start = start;
    if (r % copies_ != 0) row.cached = row.text.size() - start;  // copied by copy_first_rows
    for (; start + row.cached < row.text.size(); ++row.cached) {
      const std::size_t index = start + row.cached;
      tokens.push_back({r, row.cached, row.text[index], index + 1 == row.text.size()});
    }
  }
  return tokens;
}

float* Generation::read() {
  const std::lock_guard lock(engine_->mutex);
  if (std::any_of(rows_.begin(), rows_.end(), [](const Row& row) { return row.ended; })) {
    copies_ = 1;  // logits are stored for active rows only: copy_first_rows expects those of all
  }
  const std::vector<Token> tokens = uncached_tokens();
  float* logits = logits_.data();
  for (std::size_t begin = 0; begin < tokens.size(); begin += kMostTokens) {
    const auto first = tokens.begin() + static_cast<long>(begin);
    const auto last = first + static_cast<long>(std::min(kMostTokens, tokens.size() - begin));
    const std::vector<Token> part(first, last);
    run_pass(engine_->network, engine_->kernels, engine_->pool, engine_->workspace, cache_, part,
             logits, stride_);
    for (const Token& token : part) logits += token.wanted ? stride_ : 0;
  }
  if (copies_ > 1) copy_first_rows();
  return logits_.data();
}

// Copies the cache and the logits of the first row of each prompt to its other rows. Iterates
// backwards, since the logits, one row per prompt, are expanded in place.
void Generation::copy_first_rows() {
  for (std::size_t r = rows_.size(); r-- > 0;) {
    const std::size_t first = r / copies_ * copies_;
    const float* logits = logits_.data() + r / copies_ * stride_;
    std::copy(logits, logits + stride_, logits_.data() + r * stride_);
    if (r != first) cache_.copy_row(first, r, rows_[r].cached);
  }
  copies_ = 1;
}

bool Generation::step(std::int64_t* tokens) {
  std::vector<std::size_t> active;
  for (std::size_t r = 0; r < rows_.size(); ++r) {
    if (!rows_[r].ended) active.push_back(r);
  }
  if (active.empty() || left_ == 0) return false;
  read();
  sample(active);
  --left_;
  for (std::size_t r = 0; r < rows_.size(); ++r) tokens[r] = rows_[r].text.back();
  for (const std::size_t r : active) rows_[r].ended = stop_ && rows_[r].text.back() == *stop_;
  return true;
}

// Samples a token for each of `rows`, whose logits are in the same order. With n threads, each
// takes every nth row.
void Generation::sample(const std::vector<std::size_t>& rows) {
  std::atomic<bool> failed{false};
  const std::lock_guard lock(engine_->mutex);
  const auto choose = [&](std::size_t rank) {
    for (std::size_t i = rank; i < rows.size(); i += samplers_.size()) {
      Row& row = rows_[rows[i]];
      float* logits = logits_.data() + i * stride_;
      try {
        std::vector<float> before;
        if (with_logprobs_) before.assign(logits, logits + engine_->network.shape.vocab_size);
        if (row.counts) row.counts->penalize(sampling_, logits);
        const std::uint32_t token = samplers_[rank].draw(
            sampling_, engine_->kernels, logits, engine_->network.shape.vocab_size, row.uniform);
        if (with_logprobs_) row.logprob = before[token] - log_sum_of_exponentials(before);
        row.text.push_back(token);
        if (row.counts) row.counts->add(token, true);
      } catch (const std::exception&) {
        failed = true;
      }
    }
  };
  if (rows.size() > 1) {
    engine_->pool.run(choose);
  } else {
    choose(0);
  }
  if (!failed) return;
  left_ = 0;
  throw std::invalid_argument("the model's logits are not finite: its weights are damaged");
}

void all_logits(Engine& engine, const Generation::Ids& text, float* logits) {
  const std::lock_guard lock(engine.mutex);
  const Network& network = engine.network;
  const Cache cache(network.shape, 1, text.size(), network.format != Format::kFloat32);
  const std::size_t stride = logits_per_row(network), size = network.shape.vocab_size;
  constexpr std::size_t kAtOnce = 64;
  std::vector<float> some(kAtOnce * stride);
  for (std::size_t begin = 0; begin < text.size(); begin += kAtOnce) {
    const std::size_t count = std::min(kAtOnce, text.size() - begin);
    std::vector<Token> tokens;
    for (std::size_t i = 0; i < count; ++i) tokens.push_back({0, begin + i, text[begin + i], true});
    run_pass(network, engine.kernels, engine.pool, engine.workspace, cache, tokens, some.data(),
             stride);
    for (std::size_t i = 0; i < count; ++i) {
      std::memcpy(logits + (begin + i) * size, some.data() + i * stride, size * sizeof(float));
    }
  }
}

}  // namespace fastgpt::engine
