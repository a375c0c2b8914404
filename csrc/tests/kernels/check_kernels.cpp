// Runs the kernels of each instruction set that this processor supports, or of those named on the
// command line, on random inputs of many shapes, and compares the results with the reference
// kernels of kernels_fused.hpp:
//   - bit for bit. The last line of the output is a digest of the reference results, which is the
//     same on every machine where this program succeeds;
//   - for products and attention in code with a different rounding, within 1e-5 of the largest
//     value: portable code rounds products before adding them, and AVX512-BF16 rounds differently.
// Out-of-bounds accesses are detected if it is built with AddressSanitizer.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "common/bfloat16.hpp"
#include "engine/kernel_set.hpp"
#include "tests/kernels/kernels_fused.hpp"

namespace fastgpt::engine {
namespace {

using FloatVector = std::vector<float>;

constexpr std::size_t kInt4Groups[] = {32, 64};
constexpr std::size_t kSizes[] = {1,  2,  5,  15,  16,  17,  31,  32, 33,
                                  63, 64, 65, 100, 128, 129, 300, 777};
constexpr std::size_t kDimensions[] = {1, 16, 25, 40, 64, 128};  // head sizes

// SplitMix64 (https://prng.di.unimi.it/splitmix64.c), which gives the same numbers on all
// platforms.
class Random {
 public:
  std::uint32_t bits() {
    std::uint64_t z = state_ += 0x9E3779B97F4A7C15U;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9U;
    z = (z ^ z >> 27) * 0x94D049BB133111EBU;
    return static_cast<std::uint32_t>((z ^ z >> 31) >> 32);
  }
  std::size_t below(std::size_t count) { return bits() % count; }
  // Returns a number in [-1, 1].
  float number() { return static_cast<float>(static_cast<std::int32_t>(bits())) * 0x1p-31F; }
  FloatVector numbers(std::size_t count, float size = 1.0F) {
    FloatVector all(count);
    for (float& x : all) x = number() * size;
    return all;
  }
  float bfloat16_pair() {
    const float first = number();
    return float_of(fastgpt::bfloat16_pair(first, number()));
  }

 private:
  std::uint64_t state_ = 1;
};

// Compares the results of the kernels of one instruction set with the reference.
class Checker {
 public:
  Checker(std::string instruction_set, const Kernels& kernels)
      : instruction_set_(std::move(instruction_set)), kernels_(kernels) {}

  // Calls run(kernels, results) with the reference kernels and with those to check, each on a
  // zero-initialized array of `size` results, and compares the results.
  template <typename Run>
  void compare(const std::string& what, bool exactly, std::size_t size, const Run& run) {
    FloatVector expected(size), got(size);
    run(kernels_fused(), expected.data());
    run(kernels_, got.data());
    const bool equal = exactly ? same_bits(expected, got) : close(expected, got);
    ++comparisons_;
    if (!equal) report(what, expected, got);
    for (const float x : expected) digest_ = (digest_ ^ bits(x)) * 0x100000001B3;  // FNV-1a
  }

  // Returns whether products in that format (for attention, kFloat32) must match bit for bit.
  bool exact(Format format) const {
    if (instruction_set_ == "portable") return false;
    const std::vector<std::string> sets = instruction_sets();
    const bool rounds_otherwise =
        std::find(sets.begin(), sets.end(), "avx512-bf16") != sets.end() &&
        (instruction_set_ == "avx512-bf16" || instruction_set_ == "avx512-vnni");
    return format != Format::kBfloat16 || !rounds_otherwise;
  }

  std::uint64_t digest() const { return digest_; }
  std::size_t comparisons() const { return comparisons_; }
  std::size_t failures() const { return failures_; }

 private:
  // Returns the bits of x, with one value for all NaNs, whose payload differs between processors.
  static std::uint32_t bits(float x) {
    std::uint32_t word;
    std::memcpy(&word, &x, sizeof word);
    return (word & 0x7FFFFFFFU) > 0x7F800000U ? 0x7FC00000U : word;
  }

  static bool same_bits(const FloatVector& a, const FloatVector& b) {
    return std::equal(a.begin(), a.end(), b.begin(),
                      [](float x, float y) { return bits(x) == bits(y); });
  }

  static bool close(const FloatVector& a, const FloatVector& b) {
    float largest = 0.0F;
    for (const float x : a) largest = std::max(largest, std::fabs(x));
    return std::equal(a.begin(), a.end(), b.begin(),
                      [=](float x, float y) { return std::fabs(x - y) <= 1e-5F * largest; });
  }

  void report(const std::string& what, const FloatVector& expected, const FloatVector& got) {
    if (++failures_ > 10) return;
    std::size_t i = 0;
    while (i + 1 < got.size() && bits(expected[i]) == bits(got[i])) ++i;
    std::fprintf(stderr, "%s: mismatch in %s (%zu values), first at %zu: %.9g instead of %.9g\n",
                 instruction_set_.c_str(), what.c_str(), got.size(), i, static_cast<double>(got[i]),
                 static_cast<double>(expected[i]));
  }

  std::string instruction_set_;
  Kernels kernels_;
  std::uint64_t digest_ = 0xCBF29CE484222325;
  std::size_t comparisons_ = 0, failures_ = 0;
};

const char* name_of(Format format) {
  constexpr const char* kNames[] = {"float32", "bfloat16", "int8", "int4"};
  return kNames[static_cast<std::size_t>(format)];
}

std::string text(std::initializer_list<std::size_t> numbers) {
  std::string all;
  for (const std::size_t number : numbers) all += " " + std::to_string(number);
  return all;
}

// --- products ------------------------------------------------------------------------------------

constexpr std::size_t kPanels = 3;

// A product with random operands, and the memory that it points to.
class RandomProduct {
 public:
  // `depth` is the number of words per row, or of groups for integer formats. `extreme`: all
  // integers have the largest possible magnitude.
  RandomProduct(Random& random, Format format, std::size_t group, std::size_t depth,
                std::size_t rows, bool extreme)
      : random_(random), extreme_(extreme) {
    product.format = format;
    product.group_depth = group;
    if (is_integer(format)) {
      fill_integers(depth, rows);
    } else {
      fill_floats(depth, rows);
    }
    bias_ = random.numbers(kPanels * kPanel);
    product.weights = weights_.data();
    product.bias = bias_.data();
    product.y_stride = kPanels * kPanel;
    product.rows.end = rows;
    product.panels.end = kPanels;
  }

  Product product;

 private:
  void fill_floats(std::size_t words, std::size_t rows) {
    product.words = words;
    product.panel_words = words * kPanel;
    weights_.resize(kPanels * product.panel_words);
    words_.resize(rows * words);
    for (std::uint32_t& word : weights_) {
      const float value = any_word();
      std::memcpy(&word, &value, sizeof word);
    }
    for (float& word : words_) word = any_word();
    product.x.words = words_.data();
    product.x.stride = words;
  }

  float any_word() {
    return product.format == Format::kBfloat16 ? random_.bfloat16_pair() : random_.number();
  }

  void fill_integers(std::size_t groups, std::size_t rows) {
    const bool nibbles = product.format == Format::kInt4;
    const std::size_t quads = product.group_depth / 4;
    const std::size_t words = quads * kPanel / (nibbles ? 2 : 1);
    product.groups = groups;
    product.panel_words = groups * (words + (nibbles ? kScaleWords : 0));
    for (std::size_t i = 0; i < kPanels * groups; ++i) {
      for (std::size_t s = 0; nibbles && s < kScaleWords; ++s) weights_.push_back(two_scales());
      for (std::size_t w = 0; w < words; ++w) weights_.push_back(four_weights(nibbles));
    }
    scales_ = random_.numbers(kPanels * kPanel);
    product.scales = scales_.data();
    fill_quads(rows * groups, quads);
    product.x.stride = groups * quads;
  }

  std::uint32_t two_scales() {
    const float pair = random_.bfloat16_pair();
    std::uint32_t word;
    std::memcpy(&word, &pair, sizeof word);
    return word;
  }

  std::uint32_t four_weights(bool nibbles) {
    std::uint32_t word = random_.bits();
    if (nibbles) return extreme_ ? (word & 0x11111111U) * 15 : word;
    for (std::uint32_t shift = 0; shift < 32; shift += 8) {
      const bool least = extreme_ ? (word >> shift & 1U) != 0 : (word >> shift & 255U) == 0;
      const std::uint32_t byte = least ? 1 : (extreme_ ? 255 : word >> shift & 255U);
      word = (word & ~(255U << shift)) | byte << shift;
    }
    return word;
  }

  void fill_quads(std::size_t groups, std::size_t quads_of_group) {
    for (std::size_t g = 0; g < groups; ++g) {
      std::int32_t sum = 0;
      for (std::size_t q = 0; q < quads_of_group; ++q) {
        std::int8_t bytes[4];
        for (std::int8_t& byte : bytes) sum += byte = any_input();
        std::int32_t quad;
        std::memcpy(&quad, bytes, sizeof quad);
        quads_.push_back(quad);
      }
      sums_.push_back(sum);
      input_scales_.push_back(std::fabs(random_.number()));
    }
    product.x.quads = quads_.data();
    product.x.sums = sums_.data();
    product.x.scales = input_scales_.data();
  }

  std::int8_t any_input() {
    const auto any = static_cast<std::int8_t>(static_cast<int>(random_.below(255)) - 127);
    if (!extreme_) return any;
    return any < 0 ? std::int8_t{-127} : std::int8_t{127};
  }

  Random& random_;
  bool extreme_;
  std::vector<std::uint32_t> weights_;
  FloatVector words_, bias_, scales_, input_scales_;
  std::vector<std::int32_t> quads_, sums_;
};

void check_product(Checker& checker, const RandomProduct& random, const std::string& what) {
  const Format format = random.product.format;
  const std::size_t size = random.product.rows.end * random.product.y_stride;
  checker.compare(what, checker.exact(format), size, [&](const Kernels& kernels, float* y) {
    Product product = random.product;
    product.y = y;
    for (const Finish finish : {Finish::kStore, Finish::kAdd, Finish::kGelu}) {
      // First all rows and panels, then all panels except the first, then also only the last rows.
      product.finish = finish;
      kernels.multiply[static_cast<std::size_t>(format)](product);
      if (finish == Finish::kStore) product.panels.begin = 1;
      if (finish == Finish::kAdd) product.rows.begin = product.rows.end / 2;
    }
  });
}

void check_products(Checker& checker, Random& random, Format format, std::size_t group) {
  const std::vector<std::size_t> depths = is_integer(format)
                                              ? std::vector<std::size_t>{1, 2, 5}
                                              : std::vector<std::size_t>{1, 3, 255, 256, 257, 520};
  for (const std::size_t depth : depths) {
    for (std::size_t rows = 1; rows <= 13; ++rows) {
      const bool extreme = is_integer(format) && rows % 3 == 0;
      check_product(checker, RandomProduct(random, format, group, depth, rows, extreme),
                    std::string("product in ") + name_of(format) + ", group, depth, rows" +
                        text({group, depth, rows}));
    }
  }
}

// --- inputs and norms ----------------------------------------------------------------------------

// Returns random numbers with one outlier, and with groups of zeros and of tiny numbers.
FloatVector activations(Random& random, std::size_t size) {
  FloatVector x = random.numbers(size, 3.0F);
  x[random.below(size)] = 100.0F;
  for (std::size_t i = 0; i < size; ++i) {
    if (i / 32 % 4 == 1) x[i] = 0.0F;
    if (i / 32 % 4 == 2) x[i] *= 1e-39F;
  }
  return x;
}

void check_prepare(Checker& checker, Random& random, Format format, std::size_t group,
                   std::size_t size) {
  const FloatVector x = activations(random, size);
  const std::size_t groups = (size + group - 1) / group;
  const std::size_t words = format == Format::kFloat32 ? size : (size + 1) / 2;
  const std::size_t all = is_integer(format) ? groups * (group + 2) : words;
  checker.compare(std::string("inputs in ") + name_of(format) + text({group, size}), true, all,
                  [&](const Kernels& kernels, float* to) {
                    if (!is_integer(format)) {
                      kernels.prepare(format, group, x.data(), size,
                                      {to, nullptr, nullptr, nullptr});
                      return;
                    }
                    std::vector<std::int32_t> quads(groups * group / 4), sums(groups);
                    FloatVector scales(groups);
                    kernels.prepare(format, group, x.data(), size,
                                    {nullptr, quads.data(), scales.data(), sums.data()});
                    std::vector<std::int8_t> bytes(groups * group);
                    std::memcpy(bytes.data(), quads.data(), bytes.size());
                    for (const std::int8_t byte : bytes) *to++ = byte;
                    for (const float scale : scales) *to++ = scale;
                    for (const std::int32_t sum : sums) *to++ = static_cast<float>(sum);
                  });
}

void check_norm(Checker& checker, Random& random, std::size_t size) {
  const FloatVector x = random.numbers(size, 5.0F), gain = random.numbers(size),
                    bias = random.numbers(size);
  checker.compare("norm of" + text({size}), true, size, [&](const Kernels& kernels, float* y) {
    kernels.layer_norm(x.data(), gain.data(), bias.data(), 1e-5F, size, y);
  });
}

void check_inputs(Checker& checker, Random& random) {
  for (const std::size_t size : kSizes) {
    for (const std::size_t group : kInt4Groups) {
      check_prepare(checker, random, Format::kInt4, group, size);
    }
    check_prepare(checker, random, Format::kInt8, kInt8Group, size);
    check_prepare(checker, random, Format::kBfloat16, kInt8Group, size);
    check_prepare(checker, random, Format::kFloat32, kInt8Group, size);
    check_norm(checker, random, size);
  }
}

// --- attention -----------------------------------------------------------------------------------

// The cache of one head, filled by the kernels to check. The memory is allocated as floats for both
// formats.
struct Head {
  Head(const Kernels& kernels, bool bf16, std::size_t dimensions, std::size_t positions,
       const FloatVector& numbers) {
    const std::size_t capacity = round_up(positions, kKeysAtOnce);
    const std::size_t stride = round_up(dimensions, 16), half = bf16 ? 2 : 1;
    keys.resize(capacity * dimensions / half);
    values.resize(positions * stride / half);
    cache = {keys.data(), values.data(), bf16, dimensions, stride};
    for (std::size_t i = 0; i < positions; ++i) {
      const float* key = numbers.data() + i * 2 * dimensions;
      kernels.append(cache, i, key, key + dimensions);
    }
  }

  FloatVector keys, values;
  HeadCache cache;
};

void check_attention(Checker& checker, Random& random, bool bf16, std::size_t dimensions,
                     std::size_t visible, std::size_t count) {
  const std::size_t positions = visible + count - 1, stride = dimensions + 3;
  const FloatVector numbers = random.numbers(positions * 2 * dimensions),
                    queries = random.numbers(count * stride, 3.0F);
  const std::string what = std::string(bf16 ? "bfloat16" : "float32") +
                           ", dimensions, visible, count" + text({dimensions, visible, count});
  const Head size(kernels_fused(), bf16, dimensions, positions, numbers);
  checker.compare("cache in " + what, true, size.keys.size() + size.values.size(),
                  [&](const Kernels& kernels, float* to) {
                    const Head head(kernels, bf16, dimensions, positions, numbers);
                    std::copy(head.keys.begin(), head.keys.end(), to);
                    std::copy(head.values.begin(), head.values.end(), to + head.keys.size());
                  });
  checker.compare("attention in " + what, checker.exact(Format::kFloat32), count * stride,
                  [&](const Kernels& kernels, float* out) {
                    Head head(kernels, bf16, dimensions, positions, numbers);
                    FloatVector scores(kQueries * round_up(positions, kKeysAtOnce));
                    kernels.attend({head.cache, queries.data(), count, stride, visible, 0.125F,
                                    scores.data(), out, stride});
                  });
}

void check_attentions(Checker& checker, Random& random) {
  for (const bool bf16 : {false, true}) {
    for (const std::size_t dimensions : kDimensions) {
      for (std::size_t count = 1; count <= 9; ++count) {
        check_attention(checker, random, bf16, dimensions, 1 + random.below(150), count);
      }
      check_attention(checker, random, bf16, dimensions, 1, 1);
      check_attention(checker, random, bf16, dimensions, 64, 1);
      check_attention(checker, random, bf16, dimensions, 61, 4);
    }
  }
}

// --- sampling ------------------------------------------------------------------------------------

void check_largest(Checker& checker, const FloatVector& x, const std::string& what) {
  checker.compare(what, true, 1, [&](const Kernels& kernels, float* y) {
    *y = kernels.largest(x.data(), x.size());
  });
}

void check_sampling(Checker& checker, Random& random) {
  for (std::size_t size = 1; size <= 70; ++size) {
    const FloatVector x = random.numbers(size, 20.0F);
    check_largest(checker, x, "largest of" + text({size}));
    for (const float bad : {NAN, INFINITY, -INFINITY}) {
      FloatVector damaged = x;
      damaged[random.below(size)] = bad;
      check_largest(checker, damaged, "largest with one not finite of" + text({size}));
    }
    for (const float temperature : {1.0F, 0.7F, 0.01F}) {
      checker.compare("exponentials of" + text({size}), true, size,
                      [&](const Kernels& kernels, float* y) {
                        kernels.exponentials(x.data(), size, 20.0F, temperature, y);
                      });
    }
  }
}

Checker check(const std::string& instruction_set) {
  const Kernels kernels = kernel_set(instruction_set);
  Checker checker(instruction_set, kernels);
  Random random;
  check_products(checker, random, Format::kFloat32, 0);
  check_products(checker, random, Format::kBfloat16, 0);
  check_products(checker, random, Format::kInt8, kInt8Group);
  for (const std::size_t group : kInt4Groups) check_products(checker, random, Format::kInt4, group);
  check_inputs(checker, random);
  check_attentions(checker, random);
  check_sampling(checker, random);
  std::printf("%s: %zu comparisons, %zu failed\n", instruction_set.c_str(), checker.comparisons(),
              checker.failures());
  return checker;
}

}  // namespace
}  // namespace fastgpt::engine

int main(int count, char** arguments) {
  std::vector<std::string> sets(arguments + 1, arguments + count);
  if (sets.empty()) sets = fastgpt::engine::instruction_sets();
  bool right = true;
  std::uint64_t digest = 0;
  for (const std::string& set : sets) {
    const auto checker = fastgpt::engine::check(set);
    right = right && checker.failures() == 0;
    digest = checker.digest();
  }
  std::printf("digest %016llx\n", static_cast<unsigned long long>(digest));
  return right ? 0 : 1;
}
