#include "thread_pool.hpp"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace fastgpt::engine {
namespace {

// About the time in which a token is handed to Python and the next one asked for; waking a thread
// that sleeps takes nearly as long.
constexpr int kSpins = 4000;

void relax() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__) && defined(__GNUC__)
  // Takes about as long as the instruction above; `yield` would take no time at all, and kSpins be
  // over too soon (measured in https://github.com/rust-lang/rust/pull/84725).
  asm volatile("isb");
#else
  std::this_thread::yield();
#endif
}

long this_process() {
#if defined(__unix__) || defined(__APPLE__)
  return static_cast<long>(getpid());
#else
  return 0;
#endif
}

}  // namespace

void Barrier::wait() {
  const std::uint32_t generation = generation_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 < size_) {
    for (int spins = 0; spins < kSpins; ++spins) {
      if (generation_.load(std::memory_order_acquire) != generation) return;
      relax();
    }
    sleep_until_past(generation);
    return;
  }
  arrived_.store(0, std::memory_order_relaxed);
  // Of this store and the load behind it, and a sleeper's store and load, one sees the other.
  generation_.store(generation + 1, std::memory_order_seq_cst);
  if (sleepers_.load(std::memory_order_seq_cst) > 0) {
    const std::lock_guard lock(mutex_);
    awake_.notify_all();
  }
}

void Barrier::sleep_until_past(std::uint32_t generation) {
  std::unique_lock lock(mutex_);
  sleepers_.fetch_add(1, std::memory_order_seq_cst);
  awake_.wait(lock, [&] { return generation_.load(std::memory_order_seq_cst) != generation; });
  sleepers_.fetch_sub(1, std::memory_order_relaxed);
}

ThreadPool::ThreadPool(std::size_t size) : size_(size) { start(); }

ThreadPool::~ThreadPool() {
  if (process_ != this_process()) {
    abandon();
    return;
  }
  body_ = nullptr;
  meet();
  for (std::thread& thread : threads_) thread.join();
}

// After a fork: the threads are the parent's, and what they wait on cannot be destroyed.
void ThreadPool::abandon() {
  for (std::thread& thread : threads_) thread.detach();
  threads_.clear();
  static_cast<void>(barrier_.release());
}

void ThreadPool::start() {
  process_ = this_process();
  barrier_ = std::make_unique<Barrier>(size_);
  threads_.reserve(size_ - 1);
  for (std::size_t rank = 1; rank < size_; ++rank) {
    threads_.emplace_back([this, rank] { serve(rank); });
  }
}

void ThreadPool::run(const std::function<void(std::size_t)>& body) {
  if (process_ != this_process()) {
    abandon();
    start();
  }
  body_ = &body;
  meet();
  body(0);
  meet();
}

void ThreadPool::serve(std::size_t rank) {
  for (;;) {
    meet();
    const std::function<void(std::size_t)>* body = body_;
    if (body == nullptr) return;
    (*body)(rank);
    meet();
  }
}

}  // namespace fastgpt::engine
