#include "training/gemm.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <memory>
#include <stdexcept>
#include <thread>

#include "common/arithmetic.hpp"
#include "common/lazy_array.hpp"
#include "common/parallel.hpp"
#include "common/processor.hpp"

namespace fastgpt {
namespace {

// Block sizes. They are chosen so that a panel of B and one of A, kWordsDeep deep, fit in the L1
// cache together, a packed block of A (up to kRows × kWordsDeep words) in L2, and a packed chunk of
// B (about kWordsInChunk words) in L3.
constexpr std::size_t kWordsDeep = 256;    // depth of a block, in words
constexpr std::size_t kRows = 144;         // at most, of a tile
constexpr std::size_t kColumns = 768;      // at most, of a tile
constexpr std::size_t kBlocksInChunk = 4;  // depth blocks in a chunk of B
constexpr std::size_t kWordsInChunk = std::size_t{1} << 20;
constexpr std::size_t kWordsToPack = std::size_t{1} << 14;  // in one task
constexpr std::size_t kTilesPerThread = 8;  // for load balance: a slow thread delays others little
constexpr std::size_t kFewRows = 24, kFewColumns = 64;     // smallest tile that C is split into
constexpr std::size_t kWorthATile = std::size_t{1} << 19;  // multiplications
constexpr std::size_t kMinWorkPerThread = std::size_t{1} << 20;  // multiplications

// Returns the part size that splits n into the fewest parts of at most `limit`, as equal as
// possible, rounded up to a multiple of `unit`.
std::size_t equal_part(std::size_t n, std::size_t limit, std::size_t unit) {
  const std::size_t parts = std::max(ceil_div(n, limit), std::size_t{1});
  return std::max(round_up(ceil_div(n, parts), unit), unit);
}

// Returns the `index`th part of [0, n), in parts of size `part`.
Range part_of(std::size_t n, std::size_t part, std::size_t index) {
  return {std::min(n, index * part), std::min(n, (index + 1) * part)};
}

// Returns the matrix that receives A · B + bias before GELU: `pre` where it is given, else C.
const MatrixView<Floats>& target_of_sums(const Gemm& g) {
  return g.pre.first.data != nullptr ? g.pre : g.c;
}

// Returns whether partial sums need a separate fp32 buffer, because the target is in bfloat16.
bool sums_aside(const Gemm& g) { return target_of_sums(g).first.bf16; }

// The blocking of a product.
//
//   k is split into depth blocks of `depth`. The kernel sums one block in registers and adds it to
//     the sums of the blocks before it.
//   B is split into chunks of `chunk_columns` columns by `chunk_depth` (several depth blocks). A
//     chunk is packed by `pack_tasks` tasks, and read by all tiles of its columns.
//   C, as far as a chunk reaches, is split into `row_tiles` × `column_tiles` tiles of `rows` ×
//     `columns`. A tile is one task: it packs its rows of A itself and calls the kernel.
//
// Each element of C is the sum of its depth blocks, in their order. `depth` depends only on k and
// the kernels, so that neither the number of threads nor the other block sizes change any bit of
// the result.
struct Plan {
  Plan(const Gemm& g, const GemmKernels& kernels, unsigned threads) {
    cut_b(g, kernels);
    cut_c(g, kernels, threads);
    // With a single depth block the sums of a panel are complete after one kernel call and need
    // not be kept: all panels then share one buffer, which stays in the L1 cache.
    if (!sums_aside(g)) return;
    const std::size_t panel = rows * kernels.columns;
    sums_step = g.k > depth ? panel : 0;
    sums = std::max(sums_step * ceil_div(columns, kernels.columns), panel);
  }

  std::size_t chunks() const { return column_chunks * depth_chunks; }
  std::size_t tiles() const { return row_tiles * column_tiles; }

  std::size_t depth, chunk_depth, depth_chunks;
  std::size_t chunk_columns, column_chunks, chunk_words;
  std::size_t rows, row_tiles, columns, column_tiles;
  std::size_t pack_columns, pack_tasks;  // in a chunk
  std::size_t sums = 0, sums_step = 0;   // floats for a thread's, and from panel to panel

 private:
  // Splits B into chunks, and the packing of a chunk into tasks.
  void cut_b(const Gemm& g, const GemmKernels& kernels) {
    depth = equal_part(g.k, kWordsDeep * kernels.depths_per_word, 8);
    const std::size_t whole = std::max(round_up(g.k, depth), depth);
    // From one chunk of depths to the next, partial sums are kept in C. If C is not in fp32, a
    // chunk has all of the depth.
    chunk_depth = sums_aside(g) ? whole : depth * kBlocksInChunk;
    depth_chunks = std::max(ceil_div(g.k, chunk_depth), std::size_t{1});
    const std::size_t words = kernels.words(std::min(chunk_depth, whole));
    const std::size_t most = std::max(kWordsInChunk / words, kernels.columns);
    chunk_columns = equal_part(g.n, most, kernels.columns);
    column_chunks = std::max(ceil_div(g.n, chunk_columns), std::size_t{1});
    chunk_words = chunk_columns * words;

    pack_columns = std::max(kWordsToPack / words / kernels.columns, std::size_t{1});
    pack_columns = std::min(pack_columns * kernels.columns, chunk_columns);
    pack_tasks = ceil_div(chunk_columns, pack_columns);
  }

  // Splits the part of C that one chunk of B contributes to, all rows by its columns, into tiles.
  void cut_c(const Gemm& g, const GemmKernels& kernels, unsigned threads) {
    const std::size_t work = g.m * chunk_columns * std::min(chunk_depth, round_up(g.k, depth));
    const std::size_t wanted =
        threads < 2 ? 1 : std::min(kTilesPerThread * threads, work / kWorthATile + 1);
    // Rows are split first: every column tile packs its rows of A again, so that narrower tiles
    // cost more than lower ones.
    const std::size_t most_columns = std::min(kColumns, chunk_columns);
    const std::size_t row_cuts = ceil_div(wanted, ceil_div(chunk_columns, most_columns));
    const std::size_t few_rows = std::max(g.m / row_cuts, kFewRows);
    rows = equal_part(g.m, std::min({few_rows, kRows, g.m}), kernels.rows);
    row_tiles = ceil_div(g.m, rows);
    const std::size_t few_columns =
        std::max(chunk_columns / ceil_div(wanted, row_tiles), kFewColumns);
    columns = equal_part(chunk_columns, std::min(few_columns, most_columns), kernels.columns);
    column_tiles = ceil_div(chunk_columns, columns);
  }
};

// Returns a buffer of at least `floats` floats for packed operands. The calling thread keeps it for
// its next product.
float* workspace(std::size_t floats) {
  thread_local std::unique_ptr<LazyArray<float>> memory;
  if (!memory || memory->size() < floats) {
    memory.reset();
    memory = std::make_unique<LazyArray<float>>(floats);
  }
  return memory->data();
}

// Runs a product as a sequence of tasks, which threads claim in order from an atomic counter. For
// each chunk of B there are the tasks that pack it, then those that multiply its tiles. The chunks
// are ordered by depth, then by column; chunks of a later depth add to the sums of the earlier.
//
// A task waits only for tasks with a smaller index. These have all been claimed by some thread, and
// the first unfinished one waits for none: so there is no deadlock, whatever the number of threads.
// Faster threads take more tasks.
//
// Packed chunks are in a ring of kBuffers buffers, so that threads may pack the next chunk while
// others still multiply this one.
class Job {
 public:
  Job(const Gemm& product, const GemmKernels& kernels, unsigned threads)
      : g_(product), kernels_(kernels), plan_(product, kernels, threads) {
    a_words_ = round_up(plan_.rows * kernels.words(plan_.depth) + kGemmSlack, kCacheLine);
    own_words_ = a_words_ + round_up(plan_.sums, kCacheLine);
    const std::size_t b_words = round_up(plan_.chunk_words + kGemmSlack, kCacheLine);
    const std::size_t b_buffers = std::min(plan_.chunks(), b_.size());
    float* memory = workspace(b_buffers * b_words + threads * own_words_);
    for (std::size_t i = 0; i < b_buffers; ++i) b_[i] = memory + i * b_words;
    own_ = memory + b_buffers * b_words;
  }

  // Executes tasks until none is left. Each thread of the team calls this once; `rank` selects its
  // private buffer.
  void work(std::size_t rank) {
    const std::size_t in_chunk = plan_.pack_tasks + plan_.tiles();
    const std::size_t all = in_chunk * plan_.chunks();
    for (std::size_t task = next_++; task < all; task = next_++) {
      const std::size_t chunk = task / in_chunk;
      const std::size_t index = task % in_chunk;
      if (index < plan_.pack_tasks) {
        // The chunk that had this buffer before must be finished.
        if (chunk >= kBuffers) wait_for_tiles(chunk - kBuffers);
        pack(chunk, index);
        packed_[chunk % kBuffers].fetch_add(1, std::memory_order_release);
      } else {
        wait_for_packing(chunk);
        // The same columns at the previous depth, whose sums this tile adds to, must be finished.
        if (chunk >= plan_.column_chunks) wait_for_tiles(chunk - plan_.column_chunks);
        multiply(chunk, index - plan_.pack_tasks, own_ + rank * own_words_);
        multiplied_[chunk % kBuffers].fetch_add(1, std::memory_order_release);
      }
    }
  }

 private:
  static constexpr std::size_t kCacheLine = 16;  // floats
  static constexpr std::size_t kBuffers = 3;     // of packed chunks of B
  using Counter = std::atomic<std::size_t>;

  // The counters of a buffer are never reset: they count the tasks of all chunks that have used it.
  // Chunk c is the (c / kBuffers + 1)th of its buffer, and no task of a later one is counted before
  // all of its own. The increments release, and the loads acquire, what the tasks have written.
  void wait_for_packing(std::size_t chunk) const {
    wait_until(packed_[chunk % kBuffers], plan_.pack_tasks * (chunk / kBuffers + 1));
  }
  void wait_for_tiles(std::size_t chunk) const {
    wait_until(multiplied_[chunk % kBuffers], plan_.tiles() * (chunk / kBuffers + 1));
  }
  static void wait_until(const Counter& counter, std::size_t count) {
    constexpr int kPatience = 2000;
    for (int spins = 0; counter.load(std::memory_order_acquire) < count; ++spins) {
      if (spins > kPatience) std::this_thread::yield();  // the thread waited for may need this core
      cpu_pause();
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

  // Packs some columns of a chunk of B, for all of its depth blocks.
  void pack(std::size_t chunk, std::size_t index) {
    const Range all = columns_of(chunk), depths = depths_of(chunk);
    const Range columns = part_of(all.size(), plan_.pack_columns, index);
    for (std::size_t block = 0; block < blocks_in(depths); ++block) {
      const Range part = part_of(depths.size(), plan_.depth, block);
      const std::size_t column = all.begin + columns.begin, depth = depths.begin + part.begin;
      const ConstFloats from = g_.b.first + (g_.transpose_b ? column * g_.b.stride + depth
                                                            : depth * g_.b.stride + column);
      kernels_.pack_b({from, g_.b.stride, !g_.transpose_b, columns.size(), part.size(), g_.gelu_b},
                      packed_b(chunk, part, columns.begin));
    }
  }

  // Returns where a column of a chunk begins in its buffer. The depth blocks follow one another;
  // within a block, panels of columns do. `column` must be the first of a panel.
  float* packed_b(std::size_t chunk, const Range& block, std::size_t column) const {
    return b_[chunk % kBuffers] + plan_.chunk_columns * kernels_.words(block.begin) +
           column * kernels_.words(block.size());
  }

  // Computes one tile of C over all depth blocks of a chunk. `own` is this thread's buffer: packed
  // rows of A, followed by fp32 sums if the target is in bfloat16. The tiles of the first column
  // also compute the row sums, from the packed rows.
  void multiply(std::size_t chunk, std::size_t index, float* own) {
    const Range all = columns_of(chunk), depths = depths_of(chunk);
    const Range rows = part_of(g_.m, plan_.rows, index / plan_.column_tiles);
    const Range columns = part_of(all.size(), plan_.columns, index % plan_.column_tiles);
    const std::size_t column = all.begin + columns.begin;
    const bool sums = g_.row_sums != nullptr && column == 0;
    if (columns.size() == 0 && !sums) return;
    for (std::size_t block = 0; block < blocks_in(depths); ++block) {
      const Range part = part_of(depths.size(), plan_.depth, block);
      const std::size_t depth = depths.begin + part.begin;
      const ConstFloats from = g_.a.first + (g_.transpose_a ? depth * g_.a.stride + rows.begin
                                                            : rows.begin * g_.a.stride + depth);
      kernels_.pack_a({from, g_.a.stride, g_.transpose_a, rows.size(), part.size()}, own);
      if (sums) {
        float* to = g_.row_sums + rows.begin;
        if (depth == 0 && !g_.accumulate) std::fill_n(to, rows.size(), 0.0F);
        kernels_.add_row_sums(own, rows.size(), kernels_.words(part.size()), to);
      }
      GemmBlock tile = block_of(rows, column, depth, part.size(), own + a_words_);
      tile.a = own;
      tile.b = packed_b(chunk, part, columns.begin);
      tile.columns = columns.size();
      kernels_.multiply(tile);
    }
  }

  // Returns the kernel arguments for the block of C at `rows` and `column` to which some depths are
  // added, except the operands and the number of columns. The bias and what follows it are set only
  // for the last depth block, when the sums are complete.
  GemmBlock block_of(const Range& rows, std::size_t column, std::size_t depth, std::size_t depths,
                     float* sums) const {
    const auto at = [&](auto matrix) {
      matrix.first = matrix[rows.begin] + column;
      return matrix;
    };
    const MatrixView<Floats>& target = target_of_sums(g_);
    GemmBlock block{};
    block.rows = rows.size();
    block.depth = kernels_.words(depths);
    block.add = g_.accumulate || depth > 0;
    if (sums_aside(g_)) {
      block.sum = sums;
      block.sum_stride = kernels_.columns;
      block.panel_step = plan_.sums_step;
    } else {
      block.sum = static_cast<float*>(at(target).first.data);
      block.sum_stride = target.stride;
      block.panel_step = kernels_.columns;
    }
    if (depth + depths == g_.k) {
      block.bias = g_.bias != nullptr ? g_.bias + column : nullptr;
      if (g_.gelu_grad.first.data != nullptr) block.gelu_grad = at(g_.gelu_grad);
      if (sums_aside(g_) && (!g_.gelu || g_.pre.first.data != nullptr)) block.c = at(target);
      if (g_.gelu) block.gelu = at(g_.c);
    }
    return block;
  }

  const Gemm& g_;
  const GemmKernels& kernels_;
  const Plan plan_;
  std::array<float*, kBuffers> b_{};
  float* own_ = nullptr;  // private buffers of the threads, [threads, own_words_]
  std::size_t own_words_ = 0, a_words_ = 0;
  alignas(64) Counter next_{0};
  alignas(64) std::array<Counter, kBuffers> packed_{};
  alignas(64) std::array<Counter, kBuffers> multiplied_{};
};

struct InstructionSet {
  const char* name;
  const GemmKernels* kernels;  // null if this processor or this build does not support them
};

// Returns the instruction sets, for each precision from the slowest to the fastest.
const std::array<InstructionSet, 5>& instruction_sets() {
  static const auto all = [] {
    std::array<InstructionSet, 5> sets{{{"portable", &kGemmPortable},
                                        {"bf16-portable", &kGemmBf16Portable},
                                        {"avx2", nullptr},
                                        {"avx512", nullptr},
                                        {"bf16-avx512", nullptr}}};
#if defined(FASTGPT_HAS_AVX2)
    if (processor().avx2) sets[2].kernels = &kGemmAvx2;
#endif
#if defined(FASTGPT_HAS_AVX512)
    if (processor().avx512) sets[3].kernels = &kGemmAvx512;
#endif
#if defined(FASTGPT_HAS_AVX512_BF16)
    if (processor().avx512_bf16) sets[4].kernels = &kGemmAvx512Bf16;
#endif
    return sets;
  }();
  return all;
}

}  // namespace

const GemmKernels& gemm_kernels(const std::string& instruction_set) {
  for (const auto& [name, kernels] : instruction_sets()) {
    if (instruction_set != name) continue;
    if (kernels != nullptr) return *kernels;
    throw std::invalid_argument("this processor does not support " + instruction_set);
  }
  throw std::invalid_argument(
      "instruction_set must be portable, avx2, avx512, bf16-portable or bf16-avx512");
}

const GemmKernels& best_gemm_kernels(bool bf16) {
  const GemmKernels* best = nullptr;
  for (const InstructionSet& set : instruction_sets()) {
    if (set.kernels != nullptr && set.kernels->bf16() == bf16) best = set.kernels;
  }
  return *best;
}

bool gemm_is_faster(bool bf16) {
  if (bf16) return &best_gemm_kernels(true) != &kGemmBf16Portable && !processor().amx_bf16;
  return &best_gemm_kernels() != &kGemmPortable && processor().amd;
}

void gemm(const Gemm& product, unsigned threads, const GemmKernels& kernels) {
  if (product.m == 0) return;
  const std::size_t work = product.m * product.n * std::max(product.k, std::size_t{1});
  const std::size_t useful = std::max(work / kMinWorkPerThread, std::size_t{1});
  const auto team = static_cast<unsigned>(std::min(std::size_t{std::max(threads, 1U)}, useful));
  Job job(product, kernels, team);
  run_team(team, [&job](std::size_t rank) { job.work(rank); });
}

}  // namespace fastgpt
