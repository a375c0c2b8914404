#include "engine/weights.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "common/bfloat16.hpp"
#include "simd/reductions.hpp"

namespace fastgpt::engine {
namespace {

constexpr float kInt8Largest = 127.0F;

constexpr std::size_t kLanes = 16;  // independent accumulators of a reduction, to be vectorized

float rounded_to_bf16(float x) { return to_float32(to_bfloat16(x)); }

// Rounds to the nearest integer, ties to even, for absolute values below 2²². Unlike
// std::nearbyint, it is not a function call and can be vectorized.
inline float round_to_int(float x) {
  constexpr float kRound = 12582912.0F;  // 1.5 · 2²³
  return (x + kRound) - kRound;
}

// Rounds to the nearest integer from -8 to 7.
inline float round_to_int4(float x) { return std::min(std::max(round_to_int(x), -8.0F), 7.0F); }

inline float squared(float x) { return x * x; }

// Returns the squared error of quantizing x[0, size) to 4 bits with a scale.
float squared_error(const float* x, std::size_t size, float scale) {
  const float inverse = 1.0F / scale;
  float lanes[kLanes] = {};
  std::size_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      lanes[lane] += squared(x[i + lane] - round_to_int4(x[i + lane] * inverse) * scale);
    }
  }
  float error = 0.0F;
  for (const float lane : lanes) error += lane;
  for (; i < size; ++i) error += squared(x[i] - round_to_int4(x[i] * inverse) * scale);
  return error;
}

// Returns the scale of a kInt4 group: the candidate with the smallest squared error. Candidates map
// the element of largest absolute value to -6 to -8.75. The scale is negative if that element is
// positive, so that it can use the longer, negative side of the range from -8 to 7.
float best_scale4(const float* x, std::size_t size) {
  float extreme = 0.0F;
  for (std::size_t i = 0; i < size; ++i) {
    if (std::fabs(x[i]) > std::fabs(extreme)) extreme = x[i];
  }
  if (std::fabs(extreme) < 1e-30F) return 0.0F;
  float best = 0.0F, least = INFINITY;
  for (int step = 0; step < 12; ++step) {
    const float divisor = 6.0F + 0.25F * static_cast<float>(step);
    const float scale = rounded_to_bf16(extreme / -divisor);
    const float error = squared_error(x, size, scale);
    if (step == 0 || error < least) {  // the error of huge weights may overflow to infinity
      least = error;
      best = scale;
    }
  }
  return best;
}

// Quantizes a row to int8, and sets its scale.
void quantize_row8(const float* row, std::size_t inputs, std::uint8_t* integers, float& scale) {
  const auto magnitude = [=](std::size_t i) { return std::fabs(row[i]); };
  const float largest = lane_max<kLanes>(inputs, 0.0F, magnitude);
  const bool tiny = largest < 1e-30F;
  const float inverse = tiny ? 0.0F : kInt8Largest / largest;
  scale = tiny ? 0.0F : largest / kInt8Largest;
  for (std::size_t k = 0; k < inputs; ++k) {
    integers[k] =
        static_cast<std::uint8_t>(static_cast<std::int32_t>(round_to_int(row[k] * inverse)));
  }
}

// Quantizes `size` weights, at most a group, to `group` nibbles with kInt4Zero added, two per byte,
// and returns their scale. A shorter group is padded with weights of zero.
float quantize_group4(const float* x, std::size_t size, std::size_t group, std::uint8_t* bytes) {
  constexpr std::size_t kLargestGroup = 64;
  const float scale = best_scale4(x, size);
  const float inverse = scale == 0.0F ? 0.0F : 1.0F / scale;
  std::int32_t whole[kLargestGroup];
  for (std::size_t i = 0; i < group; ++i) {
    whole[i] =
        i < size ? static_cast<std::int32_t>(round_to_int4(x[i] * inverse)) + kInt4Zero : kInt4Zero;
  }
  for (std::size_t i = 0; i < group / 2; ++i) {
    bytes[i] = static_cast<std::uint8_t>(whole[2 * i] | whole[2 * i + 1] << 4);
  }
  return scale;
}

}  // namespace

QuantizedMatrix::QuantizedMatrix(Format format, std::size_t outputs, std::size_t inputs,
                                 std::size_t group) {
  const bool nibbles = format == Format::kInt4;
  groups = nibbles ? ceil_div(inputs, group) : 1;
  stride = nibbles ? groups * group / 2 : inputs;
  integers.resize(outputs * stride);
  scales.resize(outputs * groups);
}

void quantize(const float* weights, Range rows, std::size_t inputs, Format format,
              std::size_t group, QuantizedMatrix& to) {
  for (std::size_t n = rows.begin; n < rows.end; ++n) {
    const float* row = weights + n * inputs;
    std::uint8_t* integers = to.integers.data() + n * to.stride;
    float* scales = to.scales.data() + n * to.groups;
    if (format == Format::kInt8) {
      quantize_row8(row, inputs, integers, *scales);
      continue;
    }
    for (std::size_t g = 0; g < to.groups; ++g) {
      const std::size_t size = std::min(group, inputs - g * group);
      scales[g] = quantize_group4(row + g * group, size, group, integers + g * group / 2);
    }
  }
}

Matrix::Matrix(Format format, std::size_t outputs, std::size_t inputs, std::size_t group)
    : format_(format), outputs_(outputs), inputs_(inputs) {
  panels_ = ceil_div(outputs, kPanel);
  switch (format) {
    case Format::kFloat32:
      words_ = inputs;
      break;
    case Format::kBfloat16:
      words_ = ceil_div(inputs, 2);
      break;
    case Format::kInt8:
      group_ = kInt8Group;
      scales_.resize(panels_ * kPanel);
      break;
    case Format::kInt4:
      group_ = group;
      break;
  }
  if (is_integer(format)) groups_ = ceil_div(inputs, group_);
  panel_words_ = kPanel * words_;
  if (format == Format::kInt8) panel_words_ = groups_ * (kPanel * group_ / 4);
  if (format == Format::kInt4) panel_words_ = groups_ * (kPanel * group_ / 8 + kScaleWords);
}

Product Matrix::product(const float* bias) const {
  Product p;
  p.format = format_;
  p.weights = memory_;
  p.panel_words = panel_words_;
  p.words = words_;
  p.groups = groups_;
  p.group_depth = group_;
  p.scales = scales_.data();
  p.bias = bias;
  return p;
}

// Returns the address of a word of an output, in formats where a panel is rows of kPanel words.
const std::uint32_t* Matrix::word(std::size_t output, std::size_t index) const {
  return memory_ + output / kPanel * panel_words_ + index * kPanel + output % kPanel;
}

namespace {

// The number of words of a kInt4 group in a panel: its scales, then its weights.
std::size_t group_words4(std::size_t group) { return kScaleWords + kPanel * group / 8; }

// The position of an input's weight within a kInt4 group. A word has eight inputs: the first four
// in the low nibbles of its bytes, the next four in the high nibbles.
struct Nibble {
  explicit Nibble(std::size_t index_in_group)
      : word(index_in_group / 8),
        shift(static_cast<std::uint32_t>(index_in_group % 4 * 8 + index_in_group / 4 % 2 * 4)) {}
  std::size_t word;
  std::uint32_t shift;
};

}  // namespace

std::uint8_t Matrix::integer(std::size_t output, std::size_t input) const {
  if (format_ == Format::kInt8) {
    return static_cast<std::uint8_t>(*word(output, input / 4) >> (input % 4 * 8));
  }
  const Nibble at(input % group_);
  const std::uint32_t* begin = word(output, 0) + input / group_ * group_words4(group_);
  return static_cast<std::uint8_t>(begin[kScaleWords + at.word * kPanel] >> at.shift & 15U);
}

float Matrix::scale(std::size_t output, std::size_t group) const {
  if (format_ == Format::kInt8) return scales_[output];
  const std::uint32_t* panel = memory_ + output / kPanel * panel_words_;
  Bfloat16 scales[kPanel];
  std::memcpy(scales, panel + group * group_words4(group_), sizeof scales);
  return to_float32(scales[output % kPanel]);
}

// Writes `words` words of each output of some panels, in memory order: word_of(output, index) for
// outputs of the matrix, and `empty` for those that pad the last panel. `first` is the offset of
// word 0 in a panel; consecutive words of an output are kPanel apart.
template <typename WordOf>
void Matrix::fill(Range panels, std::size_t first, std::size_t words, std::uint32_t empty,
                  const WordOf& word_of) {
  for (std::size_t panel = panels.begin; panel < panels.end; ++panel) {
    std::uint32_t* to = memory_ + panel * panel_words_ + first;
    const std::size_t outputs = std::min(kPanel, outputs_ - panel * kPanel);
    for (std::size_t index = 0; index < words; ++index, to += kPanel) {
      for (std::size_t n = 0; n < outputs; ++n) to[n] = word_of(panel * kPanel + n, index);
      for (std::size_t n = outputs; n < kPanel; ++n) to[n] = empty;
    }
  }
}

void Matrix::pack_floats(const float* weights, Range panels) {
  const std::size_t inputs = inputs_;
  if (format_ == Format::kFloat32) {
    fill(panels, 0, words_, 0,
         [=](std::size_t n, std::size_t k) { return unsigned_bits(weights[n * inputs + k]); });
    return;
  }
  fill(panels, 0, words_, 0, [=](std::size_t n, std::size_t pair) {
    const float* x = weights + n * inputs + 2 * pair;
    return bfloat16_pair(x[0], 2 * pair + 1 < inputs ? x[1] : 0.0F);
  });
}

void Matrix::pack_integers(const std::uint8_t* integers, const float* scales, Range panels) {
  if (format_ == Format::kInt8) {
    pack_int8(integers, panels);
    const std::size_t end = std::min(outputs_, panels.end * kPanel);
    for (std::size_t n = panels.begin * kPanel; n < end; ++n) scales_[n] = scales[n];
    return;
  }
  for (std::size_t g = 0; g < groups_; ++g) pack_int4_group(integers, scales, g, panels);
}

void Matrix::pack_int8(const std::uint8_t* integers, Range panels) {
  constexpr std::uint32_t kZeros = 0x80808080U;  // kInt8Zero, four times
  const std::size_t inputs = inputs_;
  // Four weights per word. Inputs past the end are weights of zero; XOR adds kInt8Zero to all four.
  fill(panels, 0, panel_words_ / kPanel, kZeros, [=](std::size_t n, std::size_t quad) {
    std::uint32_t four = 0;
    const std::size_t left = inputs - std::min(inputs, 4 * quad);
    const std::uint8_t* x = integers + n * inputs + 4 * quad;
    for (std::size_t i = 0; i < 4; ++i) four |= (i < left ? std::uint32_t{x[i]} : 0) << (8 * i);
    return four ^ kZeros;
  });
}

namespace {

// Spreads four nibbles of 16 bits over the low nibbles of four bytes, lowest first: 0xdcba becomes
// 0x0d0c0b0a.
inline std::uint32_t spread(std::uint32_t halves) {
  const std::uint32_t pairs = (halves | halves << 8) & 0x00FF00FFU;
  return (pairs | pairs << 4) & 0x0F0F0F0FU;
}

}  // namespace

void Matrix::pack_int4_group(const std::uint8_t* integers, const float* scales, std::size_t g,
                             Range panels) {
  constexpr std::uint32_t kZeros = 0x88888888U;  // kInt4Zero, eight times
  const std::size_t groups = groups_, stride = groups_ * group_ / 2;
  const std::size_t first = g * group_words4(group_);
  const std::uint8_t* begin = integers + g * group_ / 2;
  // Four bytes of the file are eight consecutive weights: the first two bytes go to the low
  // nibbles, the other two to the high nibbles.
  fill(panels, first + kScaleWords, group_ / 8, kZeros, [=](std::size_t n, std::size_t index) {
    const std::uint8_t* x = begin + n * stride + 4 * index;
    const std::uint32_t low = x[0] | static_cast<std::uint32_t>(x[1]) << 8;
    const std::uint32_t high = x[2] | static_cast<std::uint32_t>(x[3]) << 8;
    return spread(low) | spread(high) << 4;
  });
  // Scales are two per word, and set by OR: memory is zero at first.
  for (std::size_t n = panels.begin * kPanel; n < std::min(outputs_, panels.end * kPanel); ++n) {
    std::uint32_t& two = memory_[n / kPanel * panel_words_ + first + n % kPanel / 2];
    two |= static_cast<std::uint32_t>(to_bfloat16(scales[n * groups + g])) << (n % 2 * 16);
  }
}

std::vector<float> Matrix::floats() const {
  std::vector<float> all(outputs_ * inputs_);
  for (std::size_t n = 0; n < outputs_; ++n) read_row(n, all.data() + n * inputs_);
  return all;
}

QuantizedMatrix Matrix::integers() const {
  const bool nibbles = format_ == Format::kInt4;
  QuantizedMatrix all(format_, outputs_, inputs_, group_);
  for (std::size_t n = 0; n < outputs_; ++n) {
    std::uint8_t* row = all.integers.data() + n * all.stride;
    for (std::size_t k = 0; k < (nibbles ? groups_ * group_ : inputs_); ++k) {
      const std::uint32_t value = integer(n, k);
      std::uint8_t& byte = row[nibbles ? k / 2 : k];
      byte = static_cast<std::uint8_t>(nibbles ? byte | value << (k % 2 * 4) : value ^ 0x80U);
    }
    for (std::size_t g = 0; g < all.groups; ++g) all.scales[n * all.groups + g] = scale(n, g);
  }
  return all;
}

void Matrix::read_row(std::size_t output, float* to) const {
  for (std::size_t k = 0; k < inputs_; ++k) {
    switch (format_) {
      case Format::kFloat32:
        std::memcpy(to + k, word(output, k), sizeof(float));
        break;
      case Format::kBfloat16:
        to[k] = to_float32(static_cast<Bfloat16>(*word(output, k / 2) >> (k % 2 * 16)));
        break;
      case Format::kInt8:
        to[k] = static_cast<float>(integer(output, k) - kInt8Zero) * scales_[output];
        break;
      case Format::kInt4:
        to[k] = static_cast<float>(integer(output, k) - kInt4Zero) * scale(output, k / group_);
        break;
    }
  }
}

}  // namespace fastgpt::engine
