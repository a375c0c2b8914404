#include "gemm.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <memory>
#include <thread>

#include "gemm_kernels.hpp"
#include "lazy_array.hpp"
#include "parallel.hpp"

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#endif

namespace fastgpt {
namespace {

// A panel of B of that depth stays in the first-level cache beside one of A, a block of A in the
// second level, and a chunk of B in the third.
constexpr std::size_t kDepth = 256;
constexpr std::size_t kRows = 144;
constexpr std::size_t kColumns = 768;
constexpr std::size_t kBlocksInChunk = 16;
constexpr std::size_t kFloatsInChunk = std::size_t{1} << 21;
constexpr std::size_t kFloatsToPack = std::size_t{1} << 14;  // in one task
constexpr std::size_t kTilesPerThread = 8;  // so that a slow thread delays the others little
constexpr std::size_t kFewRows = 24, kFewColumns = 64;       // of a tile that is not all
constexpr std::size_t kWorthATile = std::size_t{1} << 19;    // multiplications
constexpr std::size_t kWorthAThread = std::size_t{1} << 20;  // multiplications

std::size_t ceil_div(std::size_t a, std::size_t b) { return (a + b - 1) / b; }
std::size_t round_up(std::size_t a, std::size_t b) { return ceil_div(a, b) * b; }

// The part of at most `limit`, a multiple of `unit`, that cuts n into parts as equal as can be.
std::size_t equal_part(std::size_t n, std::size_t limit, std::size_t unit) {
  const std::size_t parts = std::max(ceil_div(n, limit), std::size_t{1});
  return std::max(round_up(ceil_div(n, parts), unit), unit);
}

struct Range {
  std::size_t begin, end;
  std::size_t size() const { return end - begin; }
};

// The `index`th of the parts of n.
Range part_of(std::size_t n, std::size_t part, std::size_t index) {
  return {std::min(n, index * part), std::min(n, (index + 1) * part)};
}

// How the product is cut up. Each element of C is the sum of blocks in depth, in their order,
// whatever the rest is: that alone decides its bits.
struct Plan {
  Plan(const Gemm& g, const GemmKernels& kernels, unsigned threads) {
    depth = equal_part(g.k, kDepth, 8);
    chunk_depth = depth * kBlocksInChunk;
    depth_chunks = std::max(ceil_div(g.k, chunk_depth), std::size_t{1});
    const std::size_t deep = std::min(chunk_depth, std::max(round_up(g.k, depth), depth));
    chunk_columns =
        equal_part(g.n, std::max(kFloatsInChunk / deep, kernels.columns), kernels.columns);
    column_chunks = std::max(ceil_div(g.n, chunk_columns), std::size_t{1});
    chunk_floats = chunk_columns * deep;

    const std::size_t chunk_work = g.m * chunk_columns * deep;
    const std::size_t tiles_wanted =
        threads < 2 ? 1 : std::min(kTilesPerThread * threads, chunk_work / kWorthATile + 1);
    // Fewer rows cost less than fewer columns: for each column tile A is packed anew.
    const std::size_t most_columns = std::min(kColumns, chunk_columns);
    const std::size_t row_cuts = ceil_div(tiles_wanted, ceil_div(chunk_columns, most_columns));
    const std::size_t few_rows = std::max(g.m / row_cuts, kFewRows);
    rows = equal_part(g.m, std::min({few_rows, kRows, g.m}), kernels.rows);
    row_tiles = ceil_div(g.m, rows);
    const std::size_t few_columns =
        std::max(chunk_columns / ceil_div(tiles_wanted, row_tiles), kFewColumns);
    columns = equal_part(chunk_columns, std::min(few_columns, most_columns), kernels.columns);
    column_tiles = ceil_div(chunk_columns, columns);

    pack_columns = std::max(kFloatsToPack / deep / kernels.columns, std::size_t{1});
    pack_columns = std::min(pack_columns * kernels.columns, chunk_columns);
    pack_tasks = ceil_div(chunk_columns, pack_columns);
  }

  std::size_t chunks() const { return column_chunks * depth_chunks; }
  std::size_t tiles() const { return row_tiles * column_tiles; }

  std::size_t depth, chunk_depth, depth_chunks;
  std::size_t chunk_columns, column_chunks, chunk_floats;
  std::size_t rows, row_tiles, columns, column_tiles;
  std::size_t pack_columns, pack_tasks;  // in a chunk
};

// What a thread's products pack into, kept for the next.
float* workspace(std::size_t floats) {
  thread_local std::unique_ptr<LazyArray<float>> memory;
  if (!memory || memory->size() < floats) {
    memory.reset();
    memory = std::make_unique<LazyArray<float>>(floats);
  }
  return memory->data();
}

// The product as a row of tasks, taken in order by threads that are free: for each chunk of B,
// those that pack it and then those that multiply with it; all chunks of one depth before those of
// the next, which add to what they left. A task waits only for earlier ones, all of which somebody
// is at: so the work gets done by as many threads as come, and the quick ones take more of it.
class Job {
 public:
  Job(const Gemm& product, const GemmKernels& kernels, unsigned threads)
      : g_(product), kernels_(kernels), plan_(product, kernels, threads) {
    const std::size_t a_floats = round_up(plan_.rows * plan_.depth + kGemmSlack, kCacheLine);
    const std::size_t b_floats = round_up(plan_.chunk_floats, kCacheLine);
    const std::size_t b_buffers = std::min(plan_.chunks(), b_.size());
    float* memory = workspace(b_buffers * b_floats + threads * a_floats);
    for (std::size_t i = 0; i < b_buffers; ++i) b_[i] = memory + i * b_floats;
    a_ = memory + b_buffers * b_floats;
    a_floats_ = a_floats;
  }

  void work(std::size_t rank) {
    const std::size_t in_chunk = plan_.pack_tasks + plan_.tiles();
    const std::size_t all = in_chunk * plan_.chunks();
    for (std::size_t task = next_++; task < all; task = next_++) {
      const std::size_t chunk = task / in_chunk;
      const std::size_t index = task % in_chunk;
      if (index < plan_.pack_tasks) {
        if (chunk >= kBuffers) wait_for_tiles(chunk - kBuffers);
        pack(chunk, index);
        packed_[chunk % kBuffers].fetch_add(1, std::memory_order_release);
      } else {
        wait_for_packing(chunk);
        if (chunk >= plan_.column_chunks) wait_for_tiles(chunk - plan_.column_chunks);
        multiply(chunk, index - plan_.pack_tasks, a_ + rank * a_floats_);
        multiplied_[chunk % kBuffers].fetch_add(1, std::memory_order_release);
      }
    }
  }

 private:
  static constexpr std::size_t kCacheLine = 16;  // floats
  static constexpr std::size_t kBuffers = 3;     // chunks that a thread may be ahead of another
  using Counter = std::atomic<std::size_t>;

  // The counters are of all chunks so far that use the same buffer.
  void wait_for_packing(std::size_t chunk) const {
    wait_until(packed_[chunk % kBuffers], plan_.pack_tasks * (chunk / kBuffers + 1));
  }
  void wait_for_tiles(std::size_t chunk) const {
    wait_until(multiplied_[chunk % kBuffers], plan_.tiles() * (chunk / kBuffers + 1));
  }
  static void wait_until(const Counter& counter, std::size_t count) {
    constexpr int kPatience = 2000;
    for (int spins = 0; counter.load(std::memory_order_acquire) < count; ++spins) {
      if (spins > kPatience) std::this_thread::yield();  // whoever is at it may need this processor
#if defined(__x86_64__) && defined(__GNUC__)
      __builtin_ia32_pause();
#endif
    }
  }

  Range columns_of(std::size_t chunk) const {
    return part_of(g_.n, plan_.chunk_columns, chunk % plan_.column_chunks);
  }
  Range depths_of(std::size_t chunk) const {
    return part_of(g_.k, plan_.chunk_depth, chunk / plan_.column_chunks);
  }
  std::size_t blocks_in(const Range& depths) const {
    return std::max(ceil_div(depths.size(), plan_.depth), std::size_t{1});
  }

  // Packs some columns of a chunk of B. What of the chunk has a depth block lies together.
  void pack(std::size_t chunk, std::size_t index) {
    const Range all = columns_of(chunk), depths = depths_of(chunk);
    const Range columns = part_of(all.size(), plan_.pack_columns, index);
    const std::size_t padded = round_up(columns.size(), kernels_.columns);
    for (std::size_t block = 0; block < blocks_in(depths); ++block) {
      const Range part = part_of(depths.size(), plan_.depth, block);
      const std::size_t column = all.begin + columns.begin, depth = depths.begin + part.begin;
      const float* from = g_.transpose_b ? g_.b.data + column * g_.b.stride + depth
                                         : g_.b.data + depth * g_.b.stride + column;
      float* to = packed_b(chunk, part, columns.begin);
      kernels_.pack_b({from, g_.b.stride, !g_.transpose_b, columns.size(), part.size()}, to);
      if (g_.gelu_b) kernels_.gelu(to, padded * part.size());
    }
  }

  float* packed_b(std::size_t chunk, const Range& block, std::size_t column) const {
    return b_[chunk % kBuffers] + plan_.chunk_columns * block.begin + column * block.size();
  }

  void multiply(std::size_t chunk, std::size_t index, float* packed_a) {
    const Range all = columns_of(chunk), depths = depths_of(chunk);
    const Range rows = part_of(g_.m, plan_.rows, index / plan_.column_tiles);
    const Range columns = part_of(all.size(), plan_.columns, index % plan_.column_tiles);
    const std::size_t column = all.begin + columns.begin;
    const bool sums = g_.row_sums != nullptr && column == 0;
    if (columns.size() == 0 && !sums) return;
    for (std::size_t block = 0; block < blocks_in(depths); ++block) {
      const Range part = part_of(depths.size(), plan_.depth, block);
      const std::size_t depth = depths.begin + part.begin;
      const float* from = g_.transpose_a ? g_.a.data + depth * g_.a.stride + rows.begin
                                         : g_.a.data + rows.begin * g_.a.stride + depth;
      kernels_.pack_a({from, g_.a.stride, g_.transpose_a, rows.size(), part.size()}, packed_a);
      if (sums) {
        float* to = g_.row_sums + rows.begin;
        if (depth == 0 && !g_.accumulate) std::fill_n(to, rows.size(), 0.0F);
        kernels_.add_row_sums(packed_a, rows.size(), part.size(), to);
      }
      kernels_.multiply(block_of(rows, column, columns.size(), depth, part.size(), packed_a,
                                 packed_b(chunk, part, columns.begin)));
    }
  }

  GemmBlock block_of(const Range& rows, std::size_t column, std::size_t columns, std::size_t depth,
                     std::size_t depths, const float* a, const float* b) const {
    const auto at = [&](const auto& matrix) {
      return matrix.data + rows.begin * matrix.stride + column;
    };
    const auto& sum = g_.pre.data != nullptr ? g_.pre : g_.c;
    GemmBlock block{};
    block.a = a;
    block.b = b;
    block.rows = rows.size();
    block.columns = columns;
    block.depth = depths;
    block.c = at(sum);
    block.c_stride = sum.stride;
    block.add = g_.accumulate || depth > 0;
    if (depth + depths == g_.k) {
      block.bias = g_.bias != nullptr ? g_.bias + column : nullptr;
      block.gelu = g_.gelu ? at(g_.c) : nullptr;
      block.gelu_stride = g_.c.stride;
      block.gelu_grad = g_.gelu_grad.data != nullptr ? at(g_.gelu_grad) : nullptr;
      block.gelu_grad_stride = g_.gelu_grad.stride;
    }
    return block;
  }

  const Gemm& g_;
  const GemmKernels& kernels_;
  const Plan plan_;
  std::array<float*, kBuffers> b_{};
  float* a_ = nullptr;
  std::size_t a_floats_ = 0;
  alignas(64) Counter next_{0};
  alignas(64) std::array<Counter, kBuffers> packed_{};
  alignas(64) std::array<Counter, kBuffers> multiplied_{};
};

const GemmKernels* kernels_of(GemmCode code) {
  switch (code) {
    case GemmCode::kAvx2:
      return gemm_kernels_avx2();
    case GemmCode::kAvx512:
      return gemm_kernels_avx512();
    default:
      return gemm_kernels_portable();
  }
}

// Whether the processor says that it is one of AMD's or of Hygon's, which builds AMD's.
bool is_amd() {
#if defined(__x86_64__) && defined(__GNUC__)
  unsigned level = 0;
  std::array<unsigned, 3> name{};
  if (__get_cpuid(0, &level, &name[0], &name[2], &name[1]) == 0) return false;
  return std::memcmp(name.data(), "AuthenticAMD", 12) == 0 ||
         std::memcmp(name.data(), "HygonGenuine", 12) == 0;
#else
  return false;
#endif
}

}  // namespace

bool can_run(GemmCode code) {
  if (kernels_of(code) == nullptr) return false;
#if defined(__x86_64__) && defined(__GNUC__)
  if (code == GemmCode::kAvx512) return __builtin_cpu_supports("avx512f");
  if (code == GemmCode::kAvx2) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  }
#endif
  return true;
}

GemmCode best_gemm_code() {
  static const GemmCode best = can_run(GemmCode::kAvx512) ? GemmCode::kAvx512
                               : can_run(GemmCode::kAvx2) ? GemmCode::kAvx2
                                                          : GemmCode::kPortable;
  return best;
}

bool gemm_is_faster() {
  static const bool faster = best_gemm_code() == GemmCode::kAvx2 && is_amd();
  return faster;
}

void gemm(const Gemm& product, unsigned threads, GemmCode code) {
  if (product.m == 0) return;
  const std::size_t work = product.m * product.n * std::max(product.k, std::size_t{1});
  const std::size_t useful = std::max(work / kWorthAThread, std::size_t{1});
  const auto team = static_cast<unsigned>(std::min(std::size_t{std::max(threads, 1U)}, useful));
  Job job(product, *kernels_of(code), team);
  run_team(team, [&job](std::size_t rank) { job.work(rank); });
}

}  // namespace fastgpt
