#include "weights.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "../bfloat16.hpp"

namespace fastgpt::engine {
namespace {

std::size_t ceil_div(std::size_t a, std::size_t b) { return (a + b - 1) / b; }

constexpr float kInt8Largest = 127.0F;

float largest_size(const float* x, std::size_t size) {
  float largest = 0.0F;
  for (std::size_t i = 0; i < size; ++i) largest = std::max(largest, std::fabs(x[i]));
  return largest;
}

float rounded_to_bf16(float x) { return widened(narrowed(x)); }

// Nearest of -8 to 7.
float nearest4(float x) { return std::min(std::max(std::nearbyint(x), -8.0F), 7.0F); }

float squared_error(const float* x, std::size_t size, float scale) {
  const float inverse = 1.0F / scale;
  float error = 0.0F;
  for (std::size_t i = 0; i < size; ++i) {
    const float difference = x[i] - nearest4(x[i] * inverse) * scale;
    error += difference * difference;
  }
  return error;
}

// The scale of a group of kInt4: of some around those that make the number of largest size -8 or
// 7, the one that gives the smallest squared error. It may be negative.
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
    if (error < least) {
      least = error;
      best = scale;
    }
  }
  return best;
}

Integers quantize8(const float* weights, std::size_t outputs, std::size_t inputs) {
  Integers result{std::vector<std::uint8_t>(outputs * inputs), std::vector<float>(outputs)};
  for (std::size_t n = 0; n < outputs; ++n) {
    const float* row = weights + n * inputs;
    const float largest = largest_size(row, inputs);
    const bool tiny = largest < 1e-30F;
    const float inverse = tiny ? 0.0F : kInt8Largest / largest;
    result.scales[n] = tiny ? 0.0F : largest / kInt8Largest;
    for (std::size_t k = 0; k < inputs; ++k) {
      const auto whole = static_cast<std::int8_t>(std::nearbyint(row[k] * inverse));
      result.integers[n * inputs + k] = static_cast<std::uint8_t>(whole);
    }
  }
  return result;
}

Integers quantize4(const float* weights, std::size_t outputs, std::size_t inputs,
                   std::size_t group) {
  const std::size_t groups = ceil_div(inputs, group), bytes = groups * group / 2;
  constexpr std::uint8_t kZeros = kInt4Zero << 4 | kInt4Zero;
  Integers result{std::vector<std::uint8_t>(outputs * bytes, kZeros),
                  std::vector<float>(outputs * groups)};
  for (std::size_t n = 0; n < outputs; ++n) {
    for (std::size_t g = 0; g < groups; ++g) {
      const float* x = weights + n * inputs + g * group;
      const std::size_t size = std::min(group, inputs - g * group);
      const float scale = best_scale4(x, size);
      const float inverse = scale == 0.0F ? 0.0F : 1.0F / scale;
      result.scales[n * groups + g] = scale;
      for (std::size_t i = 0; i < size; ++i) {
        const auto nibble = static_cast<std::uint32_t>(
            static_cast<std::int32_t>(nearest4(x[i] * inverse)) + kInt4Zero);
        std::uint8_t& byte = result.integers[n * bytes + (g * group + i) / 2];
        const std::uint32_t other = i % 2 == 0 ? byte & 0xF0U : byte & 0x0FU;
        byte = static_cast<std::uint8_t>(other | nibble << (i % 2 * 4));
      }
    }
  }
  return result;
}

}  // namespace

Integers quantize(const float* weights, std::size_t outputs, std::size_t inputs, Format format,
                  std::size_t group) {
  return format == Format::kInt8 ? quantize8(weights, outputs, inputs)
                                 : quantize4(weights, outputs, inputs, group);
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

const std::uint32_t* Matrix::word(std::size_t output, std::size_t index) const {
  return memory_ + output / kPanel * panel_words_ + index * kPanel + output % kPanel;
}

std::uint32_t* Matrix::word(std::size_t output, std::size_t index) {
  return memory_ + output / kPanel * panel_words_ + index * kPanel + output % kPanel;
}

namespace {

// Where the words of a group of kInt4 begin in a panel, its scales first.
std::size_t group_words4(std::size_t group) { return kScaleWords + kPanel * group / 8; }

// In a group of kInt4, eight inputs share a word: four the lower halves of its bytes, the next four
// the upper ones.
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

void Matrix::put_integer(std::size_t output, std::size_t input, std::uint8_t value) {
  const auto bits = static_cast<std::uint32_t>(value);
  if (format_ == Format::kInt8) {
    *word(output, input / 4) |= bits << (input % 4 * 8);
    return;
  }
  const Nibble at(input % group_);
  std::uint32_t* begin = word(output, 0) + input / group_ * group_words4(group_);
  begin[kScaleWords + at.word * kPanel] |= bits << at.shift;
}

float Matrix::scale(std::size_t output, std::size_t group) const {
  if (format_ == Format::kInt8) return scales_[output];
  const std::uint32_t* panel = memory_ + output / kPanel * panel_words_;
  Bfloat16 scales[kPanel];
  std::memcpy(scales, panel + group * group_words4(group_), sizeof scales);
  return widened(scales[output % kPanel]);
}

void Matrix::take_floats(const float* weights, std::size_t panel_begin, std::size_t panel_end) {
  const std::size_t end = std::min(outputs_, panel_end * kPanel);
  for (std::size_t n = panel_begin * kPanel; n < end; ++n) {
    const float* row = weights + n * inputs_;
    for (std::size_t k = 0; k < inputs_; ++k) {
      if (format_ == Format::kFloat32) {
        std::memcpy(word(n, k), row + k, sizeof(float));
      } else {
        *word(n, k / 2) |= static_cast<std::uint32_t>(narrowed(row[k])) << (k % 2 * 16);
      }
    }
  }
}

void Matrix::take_integers(const std::uint8_t* integers, const float* scales,
                           std::size_t panel_begin, std::size_t panel_end) {
  const bool nibbles = format_ == Format::kInt4;
  const std::size_t stride = nibbles ? groups_ * group_ / 2 : inputs_;
  const std::size_t inputs = groups_ * group_;
  for (std::size_t n = panel_begin * kPanel; n < panel_end * kPanel; ++n) {
    const bool inside = n < outputs_;
    const std::uint8_t* row = integers + n * stride;
    for (std::size_t k = 0; k < inputs; ++k) {
      std::uint32_t value = nibbles ? kInt4Zero : kInt8Zero;
      if (inside && nibbles) value = row[k / 2] >> (k % 2 * 4) & 15U;
      if (inside && !nibbles && k < inputs_) value = row[k] ^ 0x80U;
      put_integer(n, k, static_cast<std::uint8_t>(value));
    }
    if (!inside) continue;
    if (!nibbles) scales_[n] = scales[n];
    for (std::size_t g = 0; nibbles && g < groups_; ++g) {
      std::uint32_t* panel = memory_ + n / kPanel * panel_words_;
      std::uint32_t& two = panel[g * group_words4(group_) + n % kPanel / 2];
      two |= static_cast<std::uint32_t>(narrowed(scales[n * groups_ + g])) << (n % 2 * 16);
    }
  }
}

std::vector<float> Matrix::floats() const {
  std::vector<float> all(outputs_ * inputs_);
  for (std::size_t n = 0; n < outputs_; ++n) read_row(n, all.data() + n * inputs_);
  return all;
}

Integers Matrix::integers() const {
  const bool nibbles = format_ == Format::kInt4;
  const std::size_t stride = nibbles ? groups_ * group_ / 2 : inputs_;
  const std::size_t scales = nibbles ? groups_ : 1;
  Integers all{std::vector<std::uint8_t>(outputs_ * stride), std::vector<float>(outputs_ * scales)};
  for (std::size_t n = 0; n < outputs_; ++n) {
    std::uint8_t* row = all.integers.data() + n * stride;
    for (std::size_t k = 0; k < (nibbles ? groups_ * group_ : inputs_); ++k) {
      const std::uint32_t value = integer(n, k);
      std::uint8_t& byte = row[nibbles ? k / 2 : k];
      byte = static_cast<std::uint8_t>(nibbles ? byte | value << (k % 2 * 4) : value ^ 0x80U);
    }
    for (std::size_t g = 0; g < scales; ++g) all.scales[n * scales + g] = scale(n, g);
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
        to[k] = widened(static_cast<Bfloat16>(*word(output, k / 2) >> (k % 2 * 16)));
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
