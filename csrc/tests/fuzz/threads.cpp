// Threads that share one encoder and threads that train concurrently. Meant to be run with
// ThreadSanitizer.
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "tests/fuzz/fuzz.hpp"
#include "tests/fuzz/gpt2.hpp"
#include "tokenizer/bpe_trainer.hpp"

namespace fastgpt {
namespace {

constexpr std::size_t kThreads = 8;
constexpr std::size_t kLong = std::size_t{3} << 18;  // bytes: enough to be split between threads

struct Example {
  std::string text;
  std::vector<TokenId> ids;
};

// Generates a text that differs for each seed, with pieces that are not in a cache yet.
std::string write_text(std::size_t seed, std::size_t size) {
  std::string text;
  for (std::size_t i = seed; text.size() < size;
       i = i * 6364136223846793005 + 1442695040888963407) {
    text += i >> 60 == 0 ? "\n\n" : i >> 60 == 1 ? " it's" : i >> 60 == 2 ? " \xE6\xBC\xA2" : " ";
    text += std::to_string(i >> 33 & 0xFFF) + "ab" + std::string(i >> 59, 'x');
  }
  return text;
}

std::vector<Example> make_examples() {
  const BytePairEncoder encoder(gpt2_vocabulary());  // not shared with other threads
  std::vector<Example> examples;
  for (std::size_t i = 0; i < 2 * kThreads; ++i) {
    std::string text = write_text(i + 1, i % kThreads == 0 ? kLong : 20'000);
    std::vector<TokenId> ids = encode<std::uint16_t>(encoder, text, 1);
    examples.push_back({std::move(text), std::move(ids)});
  }
  return examples;
}

template <typename Work>
void run_on_all_threads(const Work& work) {
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < kThreads; ++i) threads.emplace_back(work, i);
  for (std::thread& thread : threads) thread.join();
}

// Every thread encodes all examples; some threads start at the same example, others do not.
void share_an_encoder() {
  const std::vector<Example> examples = make_examples();
  const BytePairEncoder encoder(gpt2_vocabulary());
  run_on_all_threads([&](std::size_t thread) {
    for (std::size_t i = 0; i < examples.size(); ++i) {
      const auto& [text, ids] = examples[(i + thread / 2) % examples.size()];
      const unsigned threads = 1 + thread % 2;
      check(encode<std::uint16_t>(encoder, text, threads) == ids, "16-bit ids match one thread's");
      check(encode<std::uint32_t>(encoder, text, threads) == ids, "32-bit ids match one thread's");
      check(decode(encoder, ids) == text, "decoded texts match one thread's");
    }
  });
}

std::vector<std::pair<TokenId, TokenId>> learn(unsigned threads) {
  BpeTrainer trainer(threads);
  trainer.feed(write_text(1, 2 * kLong));
  trainer.feed(write_text(2, kLong));
  while (trainer.merges().size() < 100 && trainer.merge_next(2)) {
  }
  std::vector<std::pair<TokenId, TokenId>> pairs;
  for (const auto& [left, right, merged] : trainer.merges()) pairs.emplace_back(left, right);
  return pairs;
}

void train_side_by_side() {
  const std::vector<std::pair<TokenId, TokenId>> expected = learn(1);
  check(!expected.empty(), "training makes at least one merge");
  run_on_all_threads([&](std::size_t thread) {
    if (thread < 2) check(learn(2) == expected, "two threads make the merges of one");
  });
}

}  // namespace
}  // namespace fastgpt

int main() {
  fastgpt::share_an_encoder();
  fastgpt::train_side_by_side();
  std::puts("threads: passed");
}
