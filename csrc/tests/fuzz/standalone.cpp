// A minimal replacement of libFuzzer for compilers without it: calls the target with all given
// files, then with random mutations of them. It does not use code coverage.
//
//   fuzz_encode [-max_total_time=SECONDS] [-seed=NUMBER] FILE-OR-FOLDER...
//
// An input that makes the program crash is left in the file ./crash-input.
#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "tests/fuzz/fuzz.hpp"

namespace {

namespace fs = std::filesystem;
using Random = std::mt19937_64;

constexpr std::size_t kMaxSize = 4096;
constexpr const char* kCrashInput = "crash-input";

struct Options {
  double seconds = 0;
  Random::result_type seed = 1;
  std::vector<fs::path> files;
};

void add_files(const fs::path& path, std::vector<fs::path>& files) {
  if (!fs::is_directory(path)) return files.push_back(path);
  for (const fs::directory_entry& entry : fs::recursive_directory_iterator(path)) {
    if (entry.is_regular_file()) files.push_back(entry.path());
  }
}

Options parse(int argc, char** argv) {
  constexpr std::string_view kSeconds = "-max_total_time=";
  constexpr std::string_view kSeed = "-seed=";
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument.rfind(kSeconds, 0) == 0) {
      options.seconds = std::stod(argument.substr(kSeconds.size()));
    } else if (argument.rfind(kSeed, 0) == 0) {
      options.seed = std::stoull(argument.substr(kSeed.size()));
    } else {
      add_files(argument, options.files);
    }
  }
  std::sort(options.files.begin(), options.files.end());  // the same order everywhere
  return options;
}

std::string read(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

void run(const std::string& input) {
  // Write the input before the call, because a failure ends the process.
  std::ofstream(kCrashInput, std::ios::binary) << input;
  LLVMFuzzerTestOneInput(reinterpret_cast<const std::uint8_t*>(input.data()), input.size());
}

// Returns a random number less than `count`; small numbers are more likely.
std::size_t below(std::size_t count, Random& random) {
  const std::size_t limit = random() % 2 == 0 ? count : std::min<std::size_t>(count, 20);
  return static_cast<std::size_t>(random() % limit);
}

// Applies one mutation: overwrites a byte, inserts a byte, flips a bit, erases a stretch, repeats a
// stretch, or inserts a stretch of another input.
void mutate(std::string& input, const std::vector<std::string>& inputs, Random& random) {
  const std::size_t at = static_cast<std::size_t>(random() % (input.size() + 1));
  const std::size_t size = std::min(input.size() - at, 1 + below(64, random));
  const std::string stretch = input.substr(at, size);
  const std::string& other = inputs[random() % inputs.size()];
  const std::size_t from = static_cast<std::size_t>(random() % (other.size() + 1));
  switch (random() % 6) {
    case 0:
      if (at < input.size()) input[at] = static_cast<char>(random());
      break;
    case 1:
      input.insert(at, 1, static_cast<char>(random()));
      break;
    case 2:
      input.erase(at, size);
      break;
    case 3:
      for (std::size_t n = below(200, random) + 1; n > 0; --n) input.insert(at, stretch);
      break;
    case 4:
      input.insert(at, other, from, 1 + below(256, random));
      break;
    default:
      if (at < input.size()) input[at] = static_cast<char>(input[at] ^ 1 << random() % 8);
  }
  if (input.size() > kMaxSize) input.resize(kMaxSize);
}

}  // namespace

int main(int argc, char** argv) {
  const Options options = parse(argc, argv);
  std::vector<std::string> inputs{""};
  for (const fs::path& file : options.files) inputs.push_back(read(file));
  for (const std::string& input : inputs) run(input);

  using Clock = std::chrono::steady_clock;
  const Clock::time_point start = Clock::now();
  Random random(options.seed);
  std::size_t rounds = 0;
  for (; std::chrono::duration<double>(Clock::now() - start).count() < options.seconds; ++rounds) {
    std::string input = inputs[random() % inputs.size()];
    for (std::size_t n = 1 + random() % 8; n > 0; --n) mutate(input, inputs, random);
    run(input);
  }
  fs::remove(kCrashInput);
  std::printf("%zu files and %zu mutations of them: passed\n", inputs.size() - 1, rounds);
}
