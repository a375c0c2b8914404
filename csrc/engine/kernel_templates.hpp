// The kernels other than products, as templates over a vector type: conversion of inputs,
// LayerNorm, attention and sampling. See product_templates.hpp for the rules of inclusion.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "common/arithmetic.hpp"
#include "common/bfloat16.hpp"
#include "common/repeat.hpp"
#include "engine/kernels.hpp"
#include "engine/product_templates.hpp"
#include "simd/math.hpp"
#include "simd/reductions.hpp"

namespace fastgpt::engine {
namespace {

// --- inputs --------------------------------------------------------------------------------------

constexpr std::size_t kLanes = 16;  // independent accumulators of a reduction, to be vectorized

// Rounds x[i] · inverse to integers, and returns their sum. Adding 1.5 · 2²³ rounds to the nearest
// integer, ties to even, which is then in the low bits of the float.
inline std::int32_t round_group(const float* x, std::size_t size, float inverse, std::int8_t* to) {
  constexpr float kRound = 12582912.0F;
  std::int32_t sum = 0;
  for (std::size_t i = 0; i < size; ++i) {
    const std::int32_t whole = bits_of(x[i] * inverse + kRound) - bits_of(kRound);
    to[i] = static_cast<std::int8_t>(whole);
    sum += whole;
  }
  return sum;
}

// Quantizes a row of inputs to int8 by groups. Each group's scale makes its largest absolute value
// 127; its integers are also summed, for the offset of the weights (see accumulate_integers).
inline void quantize(std::size_t group, const float* x, std::size_t size, const InputRow& to) {
  std::int8_t whole[kInt8Group] = {};
  for (std::size_t begin = 0, index = 0; begin < size; begin += group, ++index) {
    const std::size_t n = min_of(group, size - begin);
    const float largest = lane_max<kLanes>(
        n, 0.0F, [=](std::size_t i) FASTGPT_INLINE { return absolute(x[begin + i]); });
    const bool tiny = largest < 1e-30F;  // its inverse would be infinite
    if (n < group) std::memset(whole, 0, sizeof whole);
    to.sums[index] = round_group(x + begin, n, tiny ? 0.0F : 127.0F / largest, whole);
    to.scales[index] = tiny ? 0.0F : largest / 127.0F;
    std::memcpy(to.quads + begin / 4, whole, group);
  }
}

// Rounds a row of inputs to bfloat16, two to a word; an odd last one is paired with zero.
inline void narrow_pairs(const float* x, std::size_t size, float* to) {
  for (std::size_t word = 0; word < size / 2; ++word) {
    to[word] = float_of(bfloat16_pair(x[2 * word], x[2 * word + 1]));
  }
  if (size % 2 != 0) to[size / 2] = float_of(bfloat16_pair(x[size - 1], 0.0F));
}

inline void prepare(Format format, std::size_t group, const float* x, std::size_t size,
                    const InputRow& to) {
  if (is_integer(format)) {
    quantize(group, x, size, to);
  } else if (format == Format::kBfloat16) {
    narrow_pairs(x, size, to.words);
  } else {
    std::memcpy(to.words, x, size * sizeof(float));
  }
}

// --- LayerNorm -----------------------------------------------------------------------------------

template <typename Vector>
void layer_norm(const float* x, const float* gain, const float* bias, float epsilon,
                std::size_t size, float* y) {
  const auto n = static_cast<float>(size);
  const auto sum_of = [=](const auto& value)
                          FASTGPT_INLINE { return lane_sum<float, kLanes>(size, value); };
  const float mean = sum_of([=](std::size_t i) FASTGPT_INLINE { return x[i]; }) / n;
  const float variance =
      sum_of([=](std::size_t i) FASTGPT_INLINE { return (x[i] - mean) * (x[i] - mean); }) / n;
  const float scale = 1.0F / Vector::square_root(variance + epsilon);
  for (std::size_t i = 0; i < size; ++i) y[i] = (x[i] - mean) * scale * gain[i] + bias[i];
}

// --- attention -----------------------------------------------------------------------------------

// Stores the key and the value of a position, in the layout of HeadCache.
template <typename Number>
void append_as(const HeadCache& head, std::size_t position, const float* key, const float* value) {
  Number* keys = static_cast<Number*>(head.keys) + position / kKeys * head.dimensions * kKeys +
                 position % kKeys;
  Number* values = static_cast<Number*>(head.values) + position * head.value_stride;
  for (std::size_t i = 0; i < head.dimensions; ++i) put(key[i], keys + i * kKeys);
  for (std::size_t i = 0; i < head.dimensions; ++i) put(value[i], values + i);
  for (std::size_t i = head.dimensions; i < head.value_stride; ++i) put(0.0F, values + i);
}

inline void append(const HeadCache& head, std::size_t position, const float* key,
                   const float* value) {
  if (head.bf16) {
    append_as<Bfloat16>(head, position, key, value);
  } else {
    append_as<float>(head, position, key, value);
  }
}

template <typename Vector>
typename Vector::Register load_any(const float* from) {
  return Vector::load(from);
}
template <typename Vector>
typename Vector::Register load_any(const Bfloat16* from) {
  return Vector::load_narrow(from);
}

// Attention of kCount consecutive queries over the cached positions of a head, in three steps: all
// scores (`score`), the softmax of each query (`softmax_row`) and the weighted sum of values
// (`mix`).
//
// The queries share the loads of keys and values: scores are computed for all positions that the
// last query sees, and the softmax sets those after a query's own position to zero. A tile of
// scores is kCount queries by kBlocks blocks of kKeys keys, one of outputs kCount queries by
// kOutVectors registers of dimensions. Their sizes are limited by the number of registers; a single
// query takes larger tiles, to have several independent accumulators.
template <typename Vector, typename Number, std::size_t kCount>
struct AttentionTile {
  using Register = typename Vector::Register;
  static constexpr std::size_t kPerBlock = kKeys / Vector::kWidth;
  static constexpr std::size_t kBlocks = kCount == 1 ? 4 : (kPerBlock == 1 ? 2 : 1);
  static constexpr std::size_t kOutVectors = kCount == 1 || Vector::kRegisters > 16 ? 4 : 2;

  const Attention& a;
  std::size_t stride;  // of a query's scores

  explicit AttentionTile(const Attention& attention) : a(attention) {
    stride = round_up(a.visible + kCount - 1, kKeysAtOnce);
  }

  void run() const {
    const std::size_t positions = a.visible + kCount - 1;
    for (std::size_t key = 0; key < positions; key += kBlocks * kKeys) score(key);
    float inverse[kCount];
    for (std::size_t q = 0; q < kCount; ++q) inverse[q] = softmax_row(q, positions);
    std::size_t d = 0;
    for (; d + kOutVectors * Vector::kWidth <= a.head.value_stride;
         d += kOutVectors * Vector::kWidth) {
      mix<kOutVectors>(d, positions, inverse);
    }
    for (; d < a.head.value_stride; d += Vector::kWidth) mix<1>(d, positions, inverse);
  }

 private:
  // Computes the scores of kBlocks blocks of keys, from `key` on. A lane of a register is a key:
  // for each dimension, the query's number is multiplied by those of kKeys keys, which the layout
  // of HeadCache has side by side. A block may extend past the last position; the softmax does not
  // read those scores.
  void score(std::size_t key) const {
    constexpr std::size_t kVectors = kBlocks * kPerBlock;
    const std::size_t block = a.head.dimensions * kKeys;
    const Number* keys = static_cast<const Number*>(a.head.keys) + key / kKeys * block;
    Register sums[kCount][kVectors];
    repeat<kCount>([&](auto q) FASTGPT_INLINE {
      repeat<kVectors>([&](auto v) FASTGPT_INLINE { sums[q][v] = Vector::zero(); });
    });
    for (std::size_t d = 0; d < a.head.dimensions; ++d) {
      Register k[kVectors];
      repeat<kVectors>([&](auto v) FASTGPT_INLINE {
        k[v] = load_any<Vector>(keys + v / kPerBlock * block + d * kKeys +
                                v % kPerBlock * Vector::kWidth);
      });
      repeat<kCount>([&](auto q) FASTGPT_INLINE {
        const auto query = Vector::broadcast(a.queries[q * a.stride + d]);
        repeat<kVectors>([&](auto v) FASTGPT_INLINE {
          sums[q][v] = Vector::multiply_add(query, k[v], sums[q][v]);
        });
      });
    }
    const auto scale = Vector::broadcast(a.scale);
    repeat<kCount>([&](auto q) FASTGPT_INLINE {
      repeat<kVectors>([&](auto v) FASTGPT_INLINE {
        Vector::store(a.scores + q * stride + key + v * Vector::kWidth,
                      Vector::multiply(sums[q][v], scale));
      });
    });
  }

  // Replaces a query's scores by exp(score - maximum), and those that it must not see by 0. Returns
  // the reciprocal of their sum, by which `mix` multiplies at the end.
  float softmax_row(std::size_t q, std::size_t positions) const {
    float* scores = a.scores + q * stride;
    const std::size_t visible = a.visible + q;
    const auto score = [=](std::size_t key) FASTGPT_INLINE { return scores[key]; };
    const float largest = lane_max<kLanes>(visible, scores[0], score);
    for (std::size_t i = 0; i < visible; ++i) scores[i] = exp_minus(largest - scores[i]);
    for (std::size_t i = visible; i < positions; ++i) scores[i] = 0.0F;
    return 1.0F / lane_sum<float, kLanes>(visible, score);
  }

  // Computes kVectors registers of each query's output from dimension d on: the sum of the values,
  // weighted by the scores. Here a lane is a dimension. Dimensions that pad the values are not
  // stored.
  template <std::size_t kVectors>
  void mix(std::size_t d, std::size_t positions, const float* inverse) const {
    const Number* values = static_cast<const Number*>(a.head.values) + d;
    Register sums[kCount][kVectors];
    repeat<kCount>([&](auto q) FASTGPT_INLINE {
      repeat<kVectors>([&](auto v) FASTGPT_INLINE { sums[q][v] = Vector::zero(); });
    });
    for (std::size_t t = 0; t < positions; ++t) {
      Register value[kVectors];
      repeat<kVectors>([&](auto v) FASTGPT_INLINE {
        value[v] = load_any<Vector>(values + t * a.head.value_stride + v * Vector::kWidth);
      });
      repeat<kCount>([&](auto q) FASTGPT_INLINE {
        const auto weight = Vector::broadcast(a.scores[q * stride + t]);
        repeat<kVectors>([&](auto v) FASTGPT_INLINE {
          sums[q][v] = Vector::multiply_add(weight, value[v], sums[q][v]);
        });
      });
    }
    repeat<kCount>([&](auto q) FASTGPT_INLINE {
      repeat<kVectors>([&](auto v) FASTGPT_INLINE {
        float whole[Vector::kWidth];
        Vector::store(whole, Vector::multiply(sums[q][v], Vector::broadcast(inverse[q])));
        const std::size_t begin = d + v * Vector::kWidth;
        for (std::size_t i = 0; i < Vector::kWidth && begin + i < a.head.dimensions; ++i) {
          a.out[q * a.out_stride + begin + i] = whole[i];
        }
      });
    });
  }
};

// Processes queries in groups of kQueries, and the remaining ones one by one.
template <typename Vector, typename Number>
void attend_as(const Attention& all) {
  Attention part = all;
  for (std::size_t q = 0; q < all.count;) {
    part.queries = all.queries + q * all.stride;
    part.out = all.out + q * all.out_stride;
    part.visible = all.visible + q;
    if (q + kQueries <= all.count) {
      AttentionTile<Vector, Number, kQueries>(part).run();
      q += kQueries;
    } else {
      AttentionTile<Vector, Number, 1>(part).run();
      ++q;
    }
  }
}

template <typename Vector>
void attend(const Attention& attention) {
  if (attention.head.bf16) {
    attend_as<Vector, Bfloat16>(attention);
  } else {
    attend_as<Vector, float>(attention);
  }
}

// --- sampling ------------------------------------------------------------------------------------

// Returns the maximum, or NaN if any element is not finite: y - y is 0 for finite numbers and NaN
// for others, and the sum of these is added to the result. Unlike a test, this can be vectorized.
inline float largest_of(const float* x, std::size_t size) {
  const auto element = [=](std::size_t i) FASTGPT_INLINE { return x[i]; };
  const auto poison = [=](std::size_t i) FASTGPT_INLINE { return x[i] - x[i]; };
  return lane_max<kLanes>(size, x[0], element) + lane_sum<float, kLanes>(size, poison);
}

inline void exponentials(const float* x, std::size_t size, float largest, float temperature,
                         float* y) {
  for (std::size_t i = 0; i < size; ++i) y[i] = exp_minus((largest - x[i]) / temperature);
}

template <typename Vector>
constexpr Kernels make_kernels_without_products() {
  return {prepare, layer_norm<Vector>, append, attend<Vector>, largest_of, exponentials, {}};
}

template <typename Vector>
constexpr Kernels make_kernels() {
  return make_products<Vector, Format::kFloat32, Format::kBfloat16, Format::kInt8, Format::kInt4>(
      make_kernels_without_products<Vector>());
}

}  // namespace
}  // namespace fastgpt::engine
