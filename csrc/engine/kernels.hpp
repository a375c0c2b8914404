// The part of the engine that is compiled for each instruction set.
//
// Weights lie in panels of 32 outputs, in the order in which they are read: of word after word of
// depth, those of all 32 outputs side by side. So one pass over the memory from its beginning to
// its end multiplies, each output has a lane of its own, and nothing is added across lanes. An
// output's terms are added in one order, whatever else is computed beside it: its bits do not
// depend on what else is in the batch, nor on the number of threads.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastgpt::engine {

// How weights are stored, and with that how they are multiplied:
//   kFloat32   in fp32.
//   kBfloat16  weights and inputs are rounded to bfloat16, products are added up in fp32.
//   kInt8      weights -127 to 127 with a scale for each output; inputs -127 to 127 with a scale
//              for each 64 of a token's; products are added up exactly.
//   kInt4      weights -8 to 7 with a scale in bfloat16 for each group of 32 or 64 inputs of an
//              output; inputs as for kInt8, with a scale for each group.
enum class Format { kFloat32, kBfloat16, kInt8, kInt4 };
constexpr std::size_t kFormats = 4;

namespace {  // a linker must not choose among what several files make of it

constexpr bool is_integer(Format format) { return format >= Format::kInt8; }

}  // namespace

constexpr std::size_t kPanel = 32;               // outputs
constexpr std::size_t kInt8Group = 64;           // inputs that share a scale
constexpr std::size_t kScaleWords = kPanel / 2;  // 32-bit words that a group's scales take (kInt4)
constexpr std::int32_t kInt8Zero = 128,
                       kInt4Zero = 8;    // added to weights, so that none is negative
constexpr std::size_t kRowsAtOnce = 96;  // of inputs, that stay in the second-level cache
constexpr std::size_t kKeys = 16;        // that lie side by side in the cache of keys

// Rows of inputs in the form that a format multiplies.
struct Inputs {
  const float* words = nullptr;         // kFloat32: a depth each; kBfloat16: bits of two
  const std::int32_t* quads = nullptr;  // kInt8, kInt4: four depths each
  std::size_t stride = 0;               // of words or quads
  const float* scales = nullptr;        // kInt8, kInt4: [row, group]
  const std::int32_t* sums = nullptr;   // and the sum of each group's integers
};

enum class Finish { kStore, kAdd, kGelu };  // y = s, y += s, y = gelu(s)

// y = x · Wᵀ + bias for some rows of x and some panels of W. y has a column for each output of the
// panels, also where the matrix has ended.
struct Product {
  Format format = Format::kFloat32;
  const std::uint32_t* weights = nullptr;
  std::size_t panel_words = 0;              // how far apart panels are
  std::size_t words = 0;                    // of depth, in kFloat32 and kBfloat16
  std::size_t groups = 0, group_depth = 0;  // in kInt8 and kInt4
  const float* scales = nullptr;            // kInt8: of each output
  const float* bias = nullptr;
  Inputs x;
  float* y = nullptr;
  std::size_t y_stride = 0;
  Finish finish = Finish::kStore;
  std::size_t row_begin = 0, row_end = 0, panel_begin = 0, panel_end = 0;
};

// Where an input row is to be put. Exactly what the format needs is set.
struct InputRow {
  float* words = nullptr;
  std::int32_t* quads = nullptr;
  float* scales = nullptr;
  std::int32_t* sums = nullptr;
};

// A head's keys and values, in fp32 or in bfloat16.
//   keys    [position / kKeys][dimension][kKeys]
//   values  [position][value_stride], with zeros behind the head's dimensions
struct HeadCache {
  void* keys = nullptr;
  void* values = nullptr;
  bool bf16 = false;
  std::size_t dimensions = 0, value_stride = 0;
};

// Queries of one head that follow one another: the first sees `visible` positions, the next one
// more. `scores` has room for kQueries times the positions, rounded up to kKeysAtOnce.
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
  // Turns x[0, size) into inputs; what is left of the last word or group is filled with zeros.
  void (*prepare)(Format format, std::size_t group, const float* x, std::size_t size,
                  const InputRow& to);
  void (*layer_norm)(const float* x, const float* gain, const float* bias, float epsilon,
                     std::size_t size, float* y);
  void (*append)(const HeadCache& head, std::size_t position, const float* key, const float* value);
  void (*attend)(const Attention& attention);
  // The largest of x[0, size); NaN if any is not finite.
  float (*largest)(const float* x, std::size_t size);
  // y[i] = exp((x[i] - largest) / temperature)
  void (*exponentials)(const float* x, std::size_t size, float largest, float temperature,
                       float* y);
  void (*multiply[kFormats])(const Product& product);  // null for what another file has
};

// Null where the compiler cannot make such code.
const Kernels* kernels_portable();
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
const Kernels* kernels_neon();
// Nothing but `multiply` for kBfloat16, and for kInt8 and kInt4.
const Kernels* kernels_avx512_bf16();
const Kernels* kernels_avx512_vnni();
const Kernels* kernels_neon_dot();

}  // namespace fastgpt::engine
