#include "attention.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "gelu_formula.hpp"
#include "gemm.hpp"
#include "gemm_kernels.hpp"
#include "vector_loops.hpp"

namespace fastgpt {
namespace {

const GemmKernels& kernels() {
  static const GemmKernels& found = *[] {
    switch (best_gemm_code()) {
      case GemmCode::kAvx512:
        return gemm_kernels_avx512();
      case GemmCode::kAvx2:
        return gemm_kernels_avx2();
      default:
        return gemm_kernels_portable();
    }
  }();
  return found;
}

// Queries that are done at once: enough to use a packed block of keys well, few enough for their
// scores to stay in the second-level cache, and whole tiles of a product.
std::size_t queries_at_once() { return 8 * kernels().rows; }

std::size_t round_up(std::size_t n, std::size_t step) { return (n + step - 1) / step * step; }

// Keys and what stands for them are so many, for whole panels and whole vectors.
std::size_t padded_time(std::size_t time) {
  return round_up(round_up(time, kernels().columns), kLanes);
}

// A matrix in row-major order.
struct Rows {
  const float* data;
  std::size_t stride;

  Rows from(std::size_t row) const { return {data + row * stride, stride}; }
};

// Memory for packed operands and scores, kept by each thread for its next head.
class Workspace {
 public:
  // Returns room for `size` floats.
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

// Operands of a product A · B in the order in which the kernels read them. "By rows" says that
// a row of the given matrix is a row of A (a column of B), "across" that it is one depth of all.
enum class Reads { kByRows, kAcross };

void pack_a(const Rows& from, std::size_t rows, std::size_t depth, Reads reads, float* to) {
  kernels().pack_a({from.data, from.stride, reads == Reads::kAcross, rows, depth}, to);
}

void pack_b(const Rows& from, std::size_t columns, std::size_t depth, Reads reads, float* to) {
  kernels().pack_b({from.data, from.stride, reads == Reads::kAcross, columns, depth}, to);
}

// C = A · B, or C += A · B, of packed operands. b_depth: the depth that B was packed with, of which
// the first `depth` are used.
void multiply(const float* a, const float* b, std::size_t b_depth, std::size_t rows,
              std::size_t columns, std::size_t depth, bool add, float* c, std::size_t c_stride) {
  GemmBlock block{};
  block.a = a;
  block.rows = rows;
  block.depth = depth;
  block.c_stride = c_stride;
  block.add = add;
  const std::size_t width = b_depth == depth ? columns : kernels().columns;
  for (std::size_t j = 0; j < columns; j += width) {
    block.b = b + j * b_depth;
    block.columns = std::min(width, columns - j);
    block.c = c + j;
    kernels().multiply(block);
  }
}

// The rows of a block of queries: the first sees `seen` keys, each one more than the one before.
struct Scores {
  std::size_t rows, seen, stride;
  float scale;

  // How much of a row is computed, so that short rows, too, are whole vectors.
  std::size_t length() const { return round_up(seen + rows - 1, kLanes); }
};

// Makes scores probabilities, and 0 behind what a row sees; log_sums get the logarithms of the
// denominators.
void softmax_rows(const Scores& block, float* all, float* log_sums) {
  const std::size_t n = block.length();
  for (std::size_t row = 0; row < block.rows; ++row) {
    float* __restrict scores = all + row * block.stride;
    const float scale = block.scale;
    std::fill(scores + block.seen + row, scores + n, -HUGE_VALF);
    const float largest = lane_max(scores, n) * scale;
    for (std::size_t i = 0; i < n; ++i) scores[i] = exp_minus(largest - scores[i] * scale);
    const float sum = lane_sum<float>(n, [=](std::size_t i) { return scores[i]; });
    const float factor = 1.0F / sum;
    for (std::size_t i = 0; i < n; ++i) scores[i] *= factor;
    log_sums[row] = largest + std::log(sum);
  }
}

// From scores and the gradient of the probabilities to probabilities and the gradient of the
// scores; y and grad_y are what attention put out for these rows, and its gradient.
void softmax_rows_backward(const Scores& block, std::size_t size, const float* log_sums,
                           const Rows& y, const Rows& grad_y, float* all, float* all_grad) {
  const std::size_t n = block.length();
  for (std::size_t row = 0; row < block.rows; ++row) {
    const float *of_y = y.from(row).data, *of_grad = grad_y.from(row).data;
    float* __restrict scores = all + row * block.stride;
    float* __restrict grad = all_grad + row * block.stride;
    const float delta = lane_sum<float>(size, [=](std::size_t i) { return of_y[i] * of_grad[i]; });
    const float scale = block.scale, log_sum = log_sums[row];
    std::fill(scores + block.seen + row, scores + n, -HUGE_VALF);
    std::fill(grad + block.seen + row, grad + n, 0.0F);
    for (std::size_t i = 0; i < n; ++i) {
      scores[i] = exp_minus(log_sum - scores[i] * scale);
      grad[i] = scores[i] * (grad[i] - delta) * scale;
    }
  }
}

// One head of one sequence.
struct Head {
  std::size_t time, size;
  float scale;
  Rows q, k, v;
};

Head head_of(const Attention& all, std::size_t index) {
  const std::size_t width = all.heads * all.size, stride = 3 * width;
  const float* q = all.qkv + index / all.heads * all.time * stride + index % all.heads * all.size;
  const float scale = 1.0F / std::sqrt(static_cast<float>(all.size));
  return {all.time, all.size, scale, {q, stride}, {q + width, stride}, {q + 2 * width, stride}};
}

void forward_head(const Head& head, Workspace& space, float* y, std::size_t y_stride,
                  float* log_sums) {
  const std::size_t time = head.time, size = head.size, most = queries_at_once();
  const std::size_t padded = padded_time(time);
  const std::size_t packed = padded * round_up(size, kernels().columns);
  space.restart(2 * packed + most * (size + 2 * padded) + 5 * 64);
  float* keys = space.take(padded * size);
  float* values = space.take(packed);
  float* queries = space.take(most * size);
  float* scores = space.take(most * padded);
  float* shares = space.take(most * padded);
  pack_b(head.k, time, size, Reads::kByRows, keys);
  pack_b(head.v, size, time, Reads::kAcross, values);
  for (std::size_t first = 0; first < time; first += most) {
    const std::size_t rows = std::min(most, time - first), seen = first + rows;
    pack_a(head.q.from(first), rows, size, Reads::kByRows, queries);
    multiply(queries, keys, size, rows, seen, size, false, scores, padded);
    run_vectorized<softmax_rows>(Scores{rows, first + 1, padded, head.scale}, scores,
                                 log_sums + first);
    pack_a({scores, padded}, rows, seen, Reads::kByRows, shares);
    multiply(shares, values, time, rows, size, seen, false, y + first * y_stride, y_stride);
  }
}

void backward_head(const Head& head, Workspace& space, const Rows& y, const float* log_sums,
                   const Rows& grad_y, float* grad_q, std::size_t stride, std::size_t width) {
  const std::size_t time = head.time, size = head.size, most = queries_at_once();
  const std::size_t padded = padded_time(time);
  const std::size_t wide = round_up(size, kernels().columns);
  const std::size_t tall = round_up(time, kernels().rows);
  space.restart(3 * padded * wide + most * (3 * padded + 3 * wide) + tall * most + 10 * 64);
  float* keys = space.take(padded * size);      // to multiply queries with
  float* values = space.take(padded * size);    // to multiply grad_y with
  float* key_rows = space.take(padded * wide);  // to multiply the scores' gradient with
  float* scores = space.take(most * padded);
  float* grad = space.take(most * padded);
  float* left = space.take(std::max(most * padded, tall * most));
  float* right = space.take(most * wide);
  pack_b(head.k, time, size, Reads::kByRows, keys);
  pack_b(head.v, time, size, Reads::kByRows, values);
  pack_b(head.k, size, time, Reads::kAcross, key_rows);
  float *grad_k = grad_q + width, *grad_v = grad_k + width;
  for (std::size_t first = 0; first < time; first += most) {
    const std::size_t rows = std::min(most, time - first), seen = first + rows;
    const Rows q = head.q.from(first), dy = grad_y.from(first);
    pack_a(q, rows, size, Reads::kByRows, left);
    multiply(left, keys, size, rows, seen, size, false, scores, padded);
    pack_a(dy, rows, size, Reads::kByRows, left);
    multiply(left, values, size, rows, seen, size, false, grad, padded);
    run_vectorized<softmax_rows_backward>(Scores{rows, first + 1, padded, head.scale}, size,
                                          log_sums + first, y.from(first), dy, scores, grad);
    pack_a({grad, padded}, rows, seen, Reads::kByRows, left);
    multiply(left, key_rows, time, rows, size, seen, false, grad_q + first * stride, stride);
    // What keys and values get from these queries: the first to see a key finds nothing there yet.
    const auto add_to_keys = [&](const float* weights, const Rows& from, float* to) {
      pack_b(from, size, rows, Reads::kAcross, right);
      pack_a({weights, padded}, seen, rows, Reads::kAcross, left);
      multiply(left, right, rows, first, size, rows, true, to, stride);
      multiply(left + first * rows, right, rows, rows, size, rows, false, to + first * stride,
               stride);
    };
    add_to_keys(scores, dy, grad_v);
    add_to_keys(grad, q, grad_k);
  }
}

Workspace& workspace() {
  thread_local Workspace space;
  return space;
}

}  // namespace

bool attention_is_fast() { return best_gemm_code() != GemmCode::kPortable; }

void attention_forward(const Attention& attention, float* y, float* log_sums, unsigned threads) {
  const auto [batch, time, heads, size, qkv] = attention;
  for_each_tile(
      batch * heads, threads, [&, time = time, heads = heads, size = size](std::size_t index) {
        const std::size_t width = heads * size;
        float* to = y + index / heads * time * width + index % heads * size;
        forward_head(head_of(attention, index), workspace(), to, width, log_sums + index * time);
      });
}

void attention_backward(const Attention& attention, const float* y, const float* log_sums,
                        const float* grad_y, float* grad_qkv, unsigned threads) {
  const auto [batch, time, heads, size, qkv] = attention;
  for_each_tile(
      batch * heads, threads, [&, time = time, heads = heads, size = size](std::size_t index) {
        const std::size_t width = heads * size;
        const std::size_t at = index / heads * time * width + index % heads * size;
        float* to = grad_qkv + index / heads * time * 3 * width + index % heads * size;
        backward_head(head_of(attention, index), workspace(), {y + at, width},
                      log_sums + index * time, {grad_y + at, width}, to, 3 * width, width);
      });
}

}  // namespace fastgpt
