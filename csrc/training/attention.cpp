// Attention of each head by itself, as GEMMs over blocks of queries: scores, softmax, weighted sum
// of values. A thread takes one head of one sequence at a time. Only the scores of one block of
// queries exist at once; the backward pass computes them again.
#include "training/attention.hpp"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "common/arithmetic.hpp"
#include "common/matrix_view.hpp"
#include "common/parallel.hpp"
#include "simd/math.hpp"
#include "simd/vector_loops.hpp"
#include "training/gemm.hpp"

namespace fastgpt {
namespace {

// Memory for packed operands and scores, which each thread keeps for its next head. `restart` makes
// room for all buffers and frees those taken before; `take` then returns them one by one.
class Workspace {
 public:
  // Returns a buffer of `size` floats, with slack for packing behind it.
  float* take(std::size_t size) {
    const std::size_t begin = used_;
    used_ += round_up(size + kGemmSlack, 16);
    return data_.data() + begin;
  }
  void restart(std::size_t size) {
    if (data_.size() < size) data_.resize(size);
    used_ = 0;
  }

 private:
  std::vector<float> data_;
  std::size_t used_ = 0;
};

using ConstRows = MatrixView<ConstFloats>;
using Rows = MatrixView<Floats>;

// How a matrix becomes an operand of a product A · B. kByRows: its rows are the rows of A, or the
// columns of B. kAcross: each of its rows is one depth of all rows of A, or columns of B.
enum class Reads { kByRows, kAcross };

// The products of one head, with operands in fp32 or in bfloat16 and sums in fp32.
class Products {
 public:
  explicit Products(bool bf16) : kernels_(best_gemm_kernels(bf16)) {}

  // The number of queries in a block: large enough to amortize reading the packed keys, small
  // enough for the block's scores to stay in the L2 cache, and a multiple of a tile's rows.
  std::size_t queries_at_once() const { return 8 * kernels_.rows; }

  std::size_t whole_rows(std::size_t n) const { return round_up(n, kernels_.rows); }
  std::size_t whole_columns(std::size_t n) const { return round_up(n, kernels_.columns); }

  // The number of keys (or scores in a row), padded to whole panels and whole vectors.
  std::size_t padded_time(std::size_t time) const { return round_up(whole_columns(time), kLanes); }

  void pack_a(const ConstRows& from, std::size_t rows, std::size_t depth, Reads reads,
              float* to) const {
    kernels_.pack_a({from.first, from.stride, reads == Reads::kAcross, rows, depth}, to);
  }
  void pack_b(const ConstRows& from, std::size_t columns, std::size_t depth, Reads reads,
              float* to) const {
    kernels_.pack_b({from.first, from.stride, reads == Reads::kAcross, columns, depth}, to);
  }

  // Returns the part of a packed A from `row` on, which must be the first of a panel.
  const float* part_of_a(const float* a, std::size_t row, std::size_t depth) const {
    return a + row * kernels_.words(depth);
  }

  // Computes C = A · B, or C += A · B, from packed operands. `b_depth` is the depth that B was
  // packed with, of which the first `depth` are used. Panels of B are then further apart than the
  // kernel expects, so that it is called for one at a time. An odd `depth` in bfloat16 is correct,
  // since the second half of A's last word is zero.
  void multiply(const float* a, const float* b, std::size_t b_depth, std::size_t rows,
                std::size_t columns, std::size_t depth, bool add, float* c,
                std::size_t c_stride) const {
    GemmBlock block{};
    block.a = a;
    block.rows = rows;
    block.depth = kernels_.words(depth);
    block.sum_stride = c_stride;
    block.panel_step = kernels_.columns;
    block.add = add;
    const std::size_t width = b_depth == depth ? columns : kernels_.columns;
    for (std::size_t j = 0; j < columns; j += width) {
      block.b = b + j * kernels_.words(b_depth);
      block.columns = std::min(width, columns - j);
      block.sum = c + j;
      kernels_.multiply(block);
    }
  }

 private:
  const GemmKernels& kernels_;
};

template <typename Number>
void widen_row(std::size_t n, const Number* __restrict from, float* __restrict to) {
  for (std::size_t i = 0; i < n; ++i) to[i] = to_float32(from[i]);
}

template <typename Number>
void write_row(std::size_t n, const float* __restrict from, Number* __restrict to) {
  for (std::size_t i = 0; i < n; ++i) put(from[i], to + i);
}

// Returns the rows in fp32: either the given ones, or a converted copy in `aside`.
MatrixView<const float*> in_floats(const ConstRows& rows, std::size_t n, std::size_t size,
                                   float* aside) {
  if (!rows.first.bf16) return {static_cast<const float*>(rows.first.data), rows.stride};
  for (std::size_t row = 0; row < n; ++row) {
    const auto* from = static_cast<const Bfloat16*>(rows[row].data);
    run_vectorized<widen_row<Bfloat16>>(size, from, aside + row * size);
  }
  return {aside, size};
}

// Writes n rows of fp32 sums to `to`, rounded to its type.
void write_rows(const float* sums, std::size_t n, std::size_t size, const Rows& to) {
  for (std::size_t row = 0; row < n; ++row) {
    of_type(to[row], [&](auto* numbers) {
      using Number = std::remove_pointer_t<decltype(numbers)>;
      run_vectorized<write_row<Number>>(size, sums + row * size, numbers);
    });
  }
}

// The scores of a block of queries. The first query sees `seen` keys, each following query one
// more. The products compute a rectangle: the scores above the causal diagonal are masked
// afterwards.
struct Scores {
  std::size_t rows, seen, stride;
  float scale;

  // The length of all rows in the softmax: what the last row sees, padded to whole vectors.
  std::size_t length() const { return round_up(seen + rows - 1, kLanes); }
};

// Replaces scores by probabilities, in place, with zeros for the keys that a query does not see.
// log_sums receives the log-sum-exp of each row's scaled scores.
void softmax_rows(const Scores& block, float* all, float* log_sums) {
  const std::size_t n = block.length();
  for (std::size_t row = 0; row < block.rows; ++row) {
    float* __restrict scores = all + row * block.stride;
    const auto score = [=](std::size_t i) { return scores[i]; };
    const float scale = block.scale;
    std::fill(scores + block.seen + row, scores + n, -HUGE_VALF);
    const float largest = lane_max<kLanes>(n, scores[0], score) * scale;
    for (std::size_t i = 0; i < n; ++i) scores[i] = exp_minus(largest - scores[i] * scale);
    const float sum = lane_sum<float, kLanes>(n, score);
    const float factor = 1.0F / sum;
    for (std::size_t i = 0; i < n; ++i) scores[i] *= factor;
    log_sums[row] = largest + std::log(sum);
  }
}

// Replaces scores `all` by probabilities P, and the gradient of the probabilities `all_grad`, dP,
// by that of the unscaled scores, P ∘ (dP - δ) · scale. The row sums of P ∘ dP are taken from the
// output of these rows and its gradient: δ = Σ y ∘ grad_y.
void softmax_rows_backward(const Scores& block, std::size_t size, const float* log_sums,
                           const MatrixView<const float*>& y,
                           const MatrixView<const float*>& grad_y, float* all, float* all_grad) {
  const std::size_t n = block.length();
  for (std::size_t row = 0; row < block.rows; ++row) {
    const float *of_y = y[row], *of_grad = grad_y[row];
    float* __restrict scores = all + row * block.stride;
    float* __restrict grad = all_grad + row * block.stride;
    const float delta =
        lane_sum<float, kLanes>(size, [=](std::size_t i) { return of_y[i] * of_grad[i]; });
    const float scale = block.scale, log_sum = log_sums[row];
    std::fill(scores + block.seen + row, scores + n, -HUGE_VALF);
    std::fill(grad + block.seen + row, grad + n, 0.0F);
    for (std::size_t i = 0; i < n; ++i) {
      scores[i] = exp_minus(log_sum - scores[i] * scale);
      grad[i] = scores[i] * (grad[i] - delta) * scale;
    }
  }
}

// The operands of one head of one sequence.
struct Head {
  std::size_t time, size;
  float scale;
  ConstRows q, k, v;
};

// Returns the offset of a head's first number in [batch, time, parts, heads, size].
std::size_t begin_of(const Attention& all, std::size_t index, std::size_t parts) {
  const std::size_t sequence = index / all.heads, head = index % all.heads;
  return (sequence * all.time * parts * all.heads + head) * all.size;
}

Head head_of(const Attention& all, std::size_t index) {
  const std::size_t width = all.heads * all.size, stride = 3 * width;
  const ConstFloats q = all.qkv + begin_of(all, index, 3);
  const float scale = 1.0F / std::sqrt(static_cast<float>(all.size));
  return {all.time, all.size, scale, {q, stride}, {q + width, stride}, {q + 2 * width, stride}};
}

// Computes the output of one head, block of queries by block of queries:
//   S = q · kᵀ;  P = softmax(S);  y = P · v.
// Keys and values are packed once, for all blocks. A block sees only the `seen` keys up to its last
// query: S has that many columns, and P · v has that depth, so that about half of the work is
// saved.
void forward_head(const Products& products, const Head& head, Workspace& space, const Rows& y,
                  float* log_sums) {
  const std::size_t time = head.time, size = head.size, most = products.queries_at_once();
  const std::size_t padded = products.padded_time(time);
  const std::size_t packed = padded * products.whole_columns(size);
  space.restart(2 * packed + most * (2 * size + 2 * padded) + 6 * 64);
  float* keys = space.take(padded * size);    // operand of S
  float* values = space.take(packed);         // operand of y
  float* queries = space.take(most * size);   // operand of S
  float* scores = space.take(most * padded);  // S, then P
  float* shares = space.take(most * padded);  // P, packed: operand of y
  float* sums = space.take(most * size);      // y in fp32
  products.pack_b(head.k, time, size, Reads::kByRows, keys);
  products.pack_b(head.v, size, time, Reads::kAcross, values);
  for (std::size_t first = 0; first < time; first += most) {
    const std::size_t rows = std::min(most, time - first), seen = first + rows;
    products.pack_a(head.q.from(first), rows, size, Reads::kByRows, queries);
    products.multiply(queries, keys, size, rows, seen, size, false, scores, padded);
    run_vectorized<softmax_rows>(Scores{rows, first + 1, padded, head.scale}, scores,
                                 log_sums + first);
    products.pack_a({{scores}, padded}, rows, seen, Reads::kByRows, shares);
    products.multiply(shares, values, time, rows, size, seen, false, sums, size);
    write_rows(sums, rows, size, y.from(first));
  }
}

// Computes the gradients of one head, block of queries by block of queries, with P the
// probabilities, dP their gradient and dS that of the scores:
//   S = q · kᵀ;  dP = dy · vᵀ;  grad_q = dS · k;  grad_v += Pᵀ · dy;  grad_k += dSᵀ · q.
// grad_k and grad_v are accumulated in fp32 over the blocks, and written at the end.
void backward_head(const Products& products, const Head& head, Workspace& space, const ConstRows& y,
                   const float* log_sums, const ConstRows& grad_y, const Rows& grad_q,
                   const Rows& grad_k, const Rows& grad_v) {
  const std::size_t time = head.time, size = head.size, most = products.queries_at_once();
  const std::size_t padded = products.padded_time(time);
  const std::size_t wide = products.whole_columns(size), tall = products.whole_rows(time);
  const std::size_t packed_left = most * std::max({padded, tall, size});  // the largest of four
  space.restart(5 * padded * wide + most * (2 * padded + 4 * wide) + packed_left + 12 * 64);
  float* keys = space.take(padded * size);      // operand of S
  float* values = space.take(padded * size);    // operand of dP
  float* key_rows = space.take(padded * wide);  // operand of grad_q
  float* scores = space.take(most * padded);
  float* grad = space.take(most * padded);
  float* left = space.take(packed_left);
  float* right = space.take(most * wide);
  float* sums = space.take(most * size);    // first y in fp32, then grad_q
  float* aside = space.take(most * size);   // grad_y in fp32
  float* sums_k = space.take(time * size);  // for grad_k
  float* sums_v = space.take(time * size);  // for grad_v
  products.pack_b(head.k, time, size, Reads::kByRows, keys);
  products.pack_b(head.v, time, size, Reads::kByRows, values);
  products.pack_b(head.k, size, time, Reads::kAcross, key_rows);
  for (std::size_t first = 0; first < time; first += most) {
    const std::size_t rows = std::min(most, time - first), seen = first + rows;
    const ConstRows q = head.q.from(first), dy = grad_y.from(first);
    products.pack_a(q, rows, size, Reads::kByRows, left);
    products.multiply(left, keys, size, rows, seen, size, false, scores, padded);
    products.pack_a(dy, rows, size, Reads::kByRows, left);
    products.multiply(left, values, size, rows, seen, size, false, grad, padded);
    run_vectorized<softmax_rows_backward>(
        Scores{rows, first + 1, padded, head.scale}, size, log_sums + first,
        in_floats(y.from(first), rows, size, sums), in_floats(dy, rows, size, aside), scores, grad);
    products.pack_a({{grad}, padded}, rows, seen, Reads::kByRows, left);
    products.multiply(left, key_rows, time, rows, size, seen, false, sums, size);
    write_rows(sums, rows, size, grad_q.from(first));
    // Adds the contribution of these queries, weightsᵀ · from, to the gradient of keys or values.
    // Rows below `first` have sums from earlier blocks; for the others this block is the first to
    // contribute, and initializes them.
    const auto add_to_keys = [&](const float* weights, const ConstRows& from, float* to) {
      products.pack_b(from, size, rows, Reads::kAcross, right);
      products.pack_a({{weights}, padded}, seen, rows, Reads::kAcross, left);
      products.multiply(left, right, rows, first, size, rows, true, to, size);
      products.multiply(products.part_of_a(left, first, rows), right, rows, rows, size, rows, false,
                        to + first * size, size);
    };
    add_to_keys(scores, dy, sums_v);
    add_to_keys(grad, q, sums_k);
  }
  write_rows(sums_k, time, size, grad_k);
  write_rows(sums_v, time, size, grad_v);
}

Workspace& workspace() {
  thread_local Workspace space;
  return space;
}

}  // namespace

bool attention_is_fast() { return &best_gemm_kernels() != &kGemmPortable; }

void attention_forward(const Attention& attention, const Floats& y, float* log_sums,
                       unsigned threads) {
  const Products products(attention.qkv.bf16);
  const std::size_t width = attention.heads * attention.size;
  for_each_tile(attention.batch * attention.heads, threads, [&](std::size_t index) {
    forward_head(products, head_of(attention, index), workspace(),
                 {y + begin_of(attention, index, 1), width}, log_sums + index * attention.time);
  });
}

void attention_backward(const Attention& attention, const ConstFloats& y, const float* log_sums,
                        const ConstFloats& grad_y, const Floats& grad_qkv, unsigned threads) {
  const Products products(attention.qkv.bf16);
  const std::size_t width = attention.heads * attention.size;
  for_each_tile(attention.batch * attention.heads, threads, [&](std::size_t index) {
    const std::size_t at = begin_of(attention, index, 1);
    const Floats to = grad_qkv + begin_of(attention, index, 3);
    backward_head(products, head_of(attention, index), workspace(), {y + at, width},
                  log_sums + index * attention.time, {grad_y + at, width}, {to, 3 * width},
                  {to + width, 3 * width}, {to + 2 * width, 3 * width});
  });
}

}  // namespace fastgpt
