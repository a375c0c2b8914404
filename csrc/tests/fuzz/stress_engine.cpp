// Stress test of engines used by many threads. Meant to be run with ThreadSanitizer,
// AddressSanitizer or Valgrind:
//
//   stress_engine [INSTRUCTION_SET]
//
// INSTRUCTION_SET is one of the engine's, by default "best". Valgrind does not support AVX-512: use
// "avx2".
#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "engine/generation.hpp"
#include "engine/kernel_set.hpp"
#include "tests/fuzz/fuzz.hpp"

#if defined(__unix__) && !defined(__SANITIZE_THREAD__)
#include <sys/wait.h>
#include <unistd.h>
#define STRESS_HAS_FORK 1
#endif
#if defined(__has_feature)
#if __has_feature(thread_sanitizer)  // which does not support threads in a forked process
#undef STRESS_HAS_FORK
#endif
#endif

namespace fastgpt::engine {
namespace {

using Ids = Generation::Ids;

std::string instruction_set = "best";

constexpr Format kAllFormats[] = {Format::kFloat32, Format::kBfloat16, Format::kInt8,
                                  Format::kInt4};

// Irregular sizes, so that panels, groups and the threads' parts are not filled evenly.
Shape small_shape() {
  Shape shape;
  shape.vocab_size = 61;
  shape.block_size = 24;
  shape.n_layer = 2;
  shape.n_head = 2;
  shape.n_embd = 44;
  return shape;
}

std::vector<float> random_floats(std::size_t size, std::mt19937& random) {
  std::vector<float> numbers(size);
  for (float& x : numbers) x = static_cast<float>(random() >> 8) * 0x1p-24F - 0.5F;
  return numbers;
}

void fill_matrix(Engine& engine, Matrix& matrix, std::mt19937& random) {
  const std::vector<float> weights = random_floats(matrix.outputs() * matrix.inputs(), random);
  const std::size_t outputs = matrix.outputs(), inputs = matrix.inputs();
  const std::size_t threads = engine.pool.size();
  const bool whole = is_integer(matrix.format());
  QuantizedMatrix integers(whole ? matrix.format() : Format::kInt8, outputs, inputs,
                           matrix.group());
  engine.pool.run([&](std::size_t rank) {
    const Range mine = share_of(matrix.panels(), rank, threads);
    if (!whole) return matrix.pack_floats(weights.data(), mine);
    quantize(weights.data(), share_of(outputs, rank, threads), inputs, matrix.format(),
             matrix.group(), integers);
    engine.pool.barrier_wait();
    matrix.pack_integers(integers.integers.data(), integers.scales.data(), mine);
  });
}

std::shared_ptr<Engine> make_engine(Format format, std::size_t threads, unsigned seed = 1) {
  constexpr std::size_t kGroup = 32;
  auto engine =
      std::make_shared<Engine>(small_shape(), format, kGroup, threads, kernel_set(instruction_set));
  std::mt19937 random(seed);
  for (const std::string& name : engine->network.matrix_names()) {
    fill_matrix(*engine, engine->network.linear(name)->weight, random);
  }
  for (const std::string& name : engine->network.vector_names()) {
    std::vector<float>& vector = *engine->network.vector(name);
    vector = random_floats(vector.size(), random);
  }
  return engine;
}

Ids prompt(std::size_t size, std::uint32_t seed) {
  Ids ids(size);
  for (std::size_t i = 0; i < size; ++i) {
    ids[i] = static_cast<std::uint32_t>((seed + 7 * i * i) % small_shape().vocab_size);
  }
  return ids;
}

// Settings of a generation and its prompts, which are shorter than the context, as long, and
// longer.
struct Task {
  std::vector<Ids> prompts;
  Sampling sampling;
  std::optional<std::uint32_t> stop;
  std::size_t ends_early = SIZE_MAX;  // a row that is ended with Generation::end()
  std::size_t copies = 1;
};

std::vector<Task> make_tasks() {
  Sampling greedy, some, probable, penalties;
  greedy.temperature = 0.0;
  some.top_k = 5;
  probable.top_p = 0.7;
  probable.min_p = 0.01;
  penalties.repetition_penalty = 1.3;
  penalties.presence_penalty = penalties.frequency_penalty = 0.5;
  const std::vector<Ids> one{prompt(3, 1)}, two{prompt(30, 2), prompt(1, 3)};
  std::vector<Ids> five;
  for (std::uint32_t i = 0; i < 5; ++i) five.push_back(prompt(1 + 12 * i, i));
  return {{one, greedy, std::nullopt}, {one, Sampling(), 9U},    {two, some, 17U, 0},
          {five, Sampling(), 11U},     {five, probable, 40U, 3}, {five, penalties, 5U},
          {two, Sampling(), 13U, 1, 3}};
}

struct Written {
  std::vector<std::int64_t> tokens;  // [steps, rows]
  std::vector<double> logprobs;
  bool operator==(const Written& other) const {
    return tokens == other.tokens && logprobs == other.logprobs;
  }
};

using Pause = std::function<void()>;

Written write(const std::shared_ptr<Engine>& engine, const Task& task, const Pause& pause = {}) {
  constexpr std::size_t kNewTokens = 20;  // enough for the longer prompts to exceed the context
  const std::size_t rows = task.prompts.size() * task.copies;
  std::vector<std::uint64_t> seeds;
  for (std::size_t i = 0; i < rows; ++i) seeds.push_back(100 + i);
  Generation generation(engine, task.prompts, task.copies, kNewTokens, task.sampling, seeds,
                        task.stop, true);
  Written written;
  std::vector<std::int64_t> tokens(rows);
  for (std::size_t steps = 0; generation.step(tokens.data()); ++steps) {
    written.tokens.insert(written.tokens.end(), tokens.begin(), tokens.end());
    for (std::size_t r = 0; r < rows; ++r) written.logprobs.push_back(generation.logprob(r));
    if (steps == 4 && task.ends_early < rows) generation.end(task.ends_early);
    if (pause) pause();
  }
  return written;
}

std::vector<Written> write_all(const std::shared_ptr<Engine>& engine) {
  std::vector<Written> all;
  for (const Task& task : make_tasks()) all.push_back(write(engine, task));
  return all;
}

std::vector<float> logits_of(Engine& engine) {
  const Ids ids = prompt(small_shape().block_size, 5);
  std::vector<float> logits(ids.size() * small_shape().vocab_size);
  all_logits(engine, ids, logits.data());
  return logits;
}

void run_concurrently(std::size_t count, const std::function<void(std::size_t)>& work) {
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < count; ++i) threads.emplace_back(work, i);
  for (std::thread& thread : threads) thread.join();
}

void sleep_for(std::size_t microseconds) {
  std::this_thread::sleep_for(std::chrono::microseconds(microseconds));
}

// --- tests ---------------------------------------------------------------------------------------

// Between two barriers (ThreadPool::meet), each thread reads what the others have written before
// the first one. The random pauses are about as long as a waiting thread spins before it sleeps, so
// that both cases occur.
void meet_after_pauses() {
  constexpr std::size_t kRounds = 50, kMeetings = 3, kLongest = 400;
  for (const std::size_t size : {1U, 2U, 3U, 8U}) {
    ThreadPool pool(size);
    std::vector<std::size_t> written(size);
    std::vector<std::mt19937> random;
    for (std::size_t rank = 0; rank < size; ++rank) random.emplace_back(rank);
    for (std::size_t round = 0; round < kRounds; ++round) {
      pool.run([&](std::size_t rank) {
        for (std::size_t meeting = 0; meeting < kMeetings; ++meeting) {
          if (random[rank]() % 4 == 0) sleep_for(random[rank]() % kLongest);
          written[rank] = round * kMeetings + meeting;
          pool.barrier_wait();
          for (const std::size_t other : written) {
            check(other == round * kMeetings + meeting, "writes before a barrier are visible");
          }
          pool.barrier_wait();
        }
      });
      if (round % 3 == 0) sleep_for(random[0]() % kLongest);
    }
  }
}

void threads_change_no_bit() {
  for (const Format format : kAllFormats) {
    const auto alone = make_engine(format, 1);
    const std::vector<Written> expected = write_all(alone);
    const std::vector<float> logits = logits_of(*alone);
    for (const std::size_t threads : {2U, 3U}) {
      const auto engine = make_engine(format, threads);
      check(write_all(engine) == expected, "tokens do not depend on the number of threads");
      check(logits_of(*engine) == logits, "logits do not depend on the number of threads");
    }
  }
}

void engines_side_by_side() {
  std::vector<Written> expected[2];
  for (unsigned i = 0; i < 2; ++i) expected[i] = write_all(make_engine(Format::kInt8, 1, i));
  check(!(expected[0] == expected[1]), "the two engines generate different tokens");
  run_concurrently(2, [&](std::size_t i) {
    const auto engine = make_engine(Format::kInt8, 2, static_cast<unsigned>(i));
    check(write_all(engine) == expected[i], "concurrent engines are independent");
  });
}

void share_an_engine() {
  for (const std::size_t threads : {1U, 2U}) {
    const auto engine = make_engine(Format::kFloat32, threads);
    const std::vector<Written> expected = write_all(engine);
    const std::vector<float> logits = logits_of(*engine);
    run_concurrently(3, [&](std::size_t i) {
      if (i == 0) check(logits_of(*engine) == logits, "logits during concurrent generation");
      check(write_all(engine) == expected, "sharing an engine does not change its tokens");
    });
  }
}

void wake_after_pauses() {
  const Task task = make_tasks()[2];
  const auto engine = make_engine(Format::kBfloat16, 3);
  const Written expected = write(engine, task);
  for (const std::size_t pause : {100U, 300U, 5'000U}) {
    check(write(engine, task, [&] { sleep_for(pause); }) == expected,
          "pauses between steps do not change the tokens");
  }
}

// Creates and destroys pools and engines: some are never used, some used immediately, some after
// their threads have gone to sleep. The last reference to an engine is held by a Generation.
void come_and_go() {
  const Task task = make_tasks()[0];
  const Written expected = write(make_engine(Format::kFloat32, 1), task);
  for (std::size_t i = 0; i < 24; ++i) {
    const ThreadPool unused(1 + i % 8);
    auto engine = make_engine(Format::kFloat32, 1 + i % 4);
    if (i % 3 == 0) sleep_for(1000);
    if (i % 2 == 0) check(write(engine, task) == expected, "tokens of one of many engines");
    Generation text(std::move(engine), task.prompts, 1, 2, task.sampling, {1}, std::nullopt, false);
    std::int64_t token = 0;
    while (text.step(&token)) {
    }
  }
}

#ifdef STRESS_HAS_FORK
// In the child process, each pool starts new threads, which may get the same handles as those of
// the parent. The child then calls exec, so that what it cannot free is not reported as a leak.
void fork_with_engines() {
  const Task task = make_tasks()[3];
  auto first = make_engine(Format::kFloat32, 2), second = make_engine(Format::kFloat32, 3);
  const Written expected = write(first, task);
  const pid_t child = fork();
  if (child == 0) {
    check(write(first, task) == expected, "the first engine in a forked process");
    check(write(second, task) == expected, "the second engine in a forked process");
    first.reset();
    second.reset();
    execlp("true", "true", nullptr);
    _exit(1);
  }
  int status = 1;
  check(waitpid(child, &status, 0) == child && status == 0, "the forked process succeeds");
  check(write(first, task) == expected, "an engine in the parent after a fork");
}
#endif

void stress() {
  meet_after_pauses();
  threads_change_no_bit();
  engines_side_by_side();
  share_an_engine();
  wake_after_pauses();
  come_and_go();
#ifdef STRESS_HAS_FORK
  fork_with_engines();
#endif
}

}  // namespace
}  // namespace fastgpt::engine

int main(int argc, char** argv) {
  if (argc > 1) fastgpt::engine::instruction_set = argv[1];
  fastgpt::engine::stress();
  std::printf("stress_engine %s: passed\n", fastgpt::engine::instruction_set.c_str());
}
