// The interface of the inference engine's kernels, which are compiled once for each instruction
// set.
//
// Weights are packed in panels of 32 outputs. Within a panel, the 32-bit words of one depth are
// side by side for all 32 outputs, followed by those of the next depth. A product thus reads the
// weights sequentially, each output has a vector lane of its own, and there are no horizontal
// additions. The terms of an output are always added in the same order, so that its bits depend
// neither on the other rows of the batch nor on the number of threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/arithmetic.hpp"

namespace fastgpt::engine {

// The storage format of weights, which determines how they are multiplied:
//   kFloat32   fp32.
//   kBfloat16  weights and inputs are rounded to bfloat16; products are accumulated in fp32.
//   kInt8      weights from -127 to 127 with an fp32 scale per output; inputs are quantized to -127
//              to 127 with a scale per group of 64 of a token's inputs; the products of a group are
//              accumulated exactly, in int32.
//   kInt4      weights from -8 to 7 with a bfloat16 scale per output and group of 32 or 64 inputs;
//              inputs as for kInt8, with a scale per group of the same size.
enum class Format { kFloat32, kBfloat16, kInt8, kInt4 };
constexpr std::size_t kFormats = 4;

namespace {  // internal linkage: each file compiles its own copy for its instruction set

constexpr bool is_integer(Format format) { return format >= Format::kInt8; }

}  // namespace

constexpr std::size_t kPanel = 32;               // outputs
constexpr std::size_t kInt8Group = 64;           // inputs that share a scale
constexpr std::size_t kScaleWords = kPanel / 2;  // 32-bit words of a group's scales (kInt4)
constexpr std::int32_t kInt8Zero = 128,
                       kInt4Zero = 8;    // added to weights to store them unsigned
constexpr std::size_t kRowsAtOnce = 96;  // of inputs, which then stay in the L2 cache
constexpr std::size_t kKeys = 16;        // side by side in the key cache

// Rows of inputs, converted for the weights' format.
struct Inputs {
  const float* words = nullptr;         // kFloat32: one input each; kBfloat16: two
  const std::int32_t* quads = nullptr;  // kInt8, kInt4: four inputs each
  std::size_t stride = 0;               // of a row, in words or quads
  const float* scales = nullptr;        // kInt8, kInt4: [row, group]
  const std::int32_t* sums = nullptr;   // likewise, the sum of the group's integers
};

enum class Finish { kStore, kAdd, kGelu };  // y = s, y += s, y = gelu(s)

// The arguments of y = x · Wᵀ + bias for a range of rows of x and a range of panels of W. y has a
// column for each output of the panels, including those that pad the last panel.
struct Product {
  Format format = Format::kFloat32;
  const std::uint32_t* weights = nullptr;
  std::size_t panel_words = 0;              // distance between panels
  std::size_t words = 0;                    // per output, kFloat32 and kBfloat16
  std::size_t groups = 0, group_depth = 0;  // kInt8 and kInt4
  const float* scales = nullptr;            // kInt8: one per output
  const float* bias = nullptr;
  Inputs x;
  float* y = nullptr;
  std::size_t y_stride = 0;
  Finish finish = Finish::kStore;
  Range rows, panels;
};

// The destination of a converted input row. Only the members that the format uses are set.
struct InputRow {
  float* words = nullptr;
  std::int32_t* quads = nullptr;
  float* scales = nullptr;
  std::int32_t* sums = nullptr;
};

// The cached keys and values of a head, in fp32 or in bfloat16.
//   keys    [position / kKeys][dimension][kKeys]: for one dimension, kKeys keys fill vector lanes,
//           so that scores are computed without horizontal additions
//   values  [position][value_stride], padded with zeros after the head's dimensions
struct HeadCache {
  void* keys = nullptr;
  void* values = nullptr;
  bool bf16 = false;
  std::size_t dimensions = 0, value_stride = 0;
};

// The arguments of attention for consecutive queries of one head. The first query sees `visible`
// positions, each following query one more. `scores` is a buffer of kQueries rows of the number of
// positions, rounded up to kKeysAtOnce.
struct Attention {
  HeadCache head;
  const float* queries = nullptr;
  std::size_t count = 0, stride = 0, visible = 0;
  float scale = 1.0F;
  float* scores = nullptr;
  float* out = nullptr;
  std::size_t out_stride = 0;
};
constexpr std::size_t kQueries = 4;
constexpr std::size_t kKeysAtOnce = 4 * kKeys;

struct Kernels {
  // Converts x[0, size) to inputs for `format`. The last word or group is padded with zeros.
  void (*prepare)(Format format, std::size_t group, const float* x, std::size_t size,
                  const InputRow& to);
  void (*layer_norm)(const float* x, const float* gain, const float* bias, float epsilon,
                     std::size_t size, float* y);
  // Stores the key and the value of a position.
  void (*append)(const HeadCache& head, std::size_t position, const float* key, const float* value);
  // Computes softmax(q kᵀ · scale) v for each query.
  void (*attend)(const Attention& attention);
  // Returns the maximum of x[0, size), or NaN if any element is not finite.
  float (*largest)(const float* x, std::size_t size);
  // y[i] = exp((x[i] - largest) / temperature)
  void (*exponentials)(const float* x, std::size_t size, float largest, float temperature,
                       float* y);
  void (*multiply[kFormats])(const Product& product);  // null if not in this file's set
};

// Those of the instruction sets that this build has: see csrc/instructions.cmake. The names say
// which; the comments, which members are set if not all are.
extern const Kernels kKernelsPortable, kKernelsAvx2, kKernelsNeon;
extern const Kernels kKernelsAvx512;                       // not the products in kInt8 and kInt4
extern const Kernels kKernelsAvx512Bf16;                   // only the product in kBfloat16
extern const Kernels kKernelsAvx512Vnni, kKernelsNeonDot;  // only those in kInt8 and kInt4

}  // namespace fastgpt::engine
