#include "engine/thread_pool.hpp"

#include <stdexcept>
#include <string>
#include <system_error>

#include "common/parallel.hpp"

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace fastgpt::engine {
namespace {

// Spinning lasts about as long as it takes to return a token to Python and to be called for the
// next one. Waking a sleeping thread takes nearly as long.
constexpr int kSpins = 4000;

long this_process() {
#if defined(__unix__) || defined(__APPLE__)
  return static_cast<long>(getpid());
#else
  return 0;
#endif
}

}  // namespace

void Barrier::wait() {
  // The generation cannot change before this thread has arrived.
  const std::uint32_t generation = generation_.load(std::memory_order_relaxed);
  if (arrive(1)) return;
  for (int spins = 0; spins < kSpins; ++spins) {
    if (generation_.load(std::memory_order_acquire) != generation) return;
    cpu_pause();
  }
  sleep_until_past(generation);
}

bool Barrier::arrive(std::size_t count) {
  if (arrived_.fetch_add(count, std::memory_order_acq_rel) + count < size_) return false;
  arrived_.store(0, std::memory_order_relaxed);
  // This thread increments generation_, then reads sleepers_; a sleeper increments sleepers_, then
  // reads generation_. All four operations are sequentially consistent, so that at least one thread
  // sees the other's increment: either this one notifies, or the sleeper does not wait. Taking the
  // mutex ensures that a sleeper which has read the old generation is already waiting.
  generation_.fetch_add(1, std::memory_order_seq_cst);
  if (sleepers_.load(std::memory_order_seq_cst) > 0) {
    const std::lock_guard lock(mutex_);
    awake_.notify_all();
  }
  return true;
}

void Barrier::sleep_until_past(std::uint32_t generation) {
  std::unique_lock lock(mutex_);
  sleepers_.fetch_add(1, std::memory_order_seq_cst);
  awake_.wait(lock, [&] { return generation_.load(std::memory_order_seq_cst) != generation; });
  sleepers_.fetch_sub(1, std::memory_order_relaxed);
}

ThreadPool::ThreadPool(std::size_t size) : size_(size) { start(); }

ThreadPool::~ThreadPool() {
  if (process_ == this_process()) {
    stop();
  } else {
    leak_after_fork();
  }
}

void ThreadPool::start() {
  team_ = std::make_unique<Team>(size_);
  team_->threads.reserve(size_ - 1);
  try {
    for (std::size_t rank = 1; rank < size_; ++rank) {
      team_->threads.emplace_back([this, rank] { worker_loop(rank); });
    }
  } catch (const std::system_error&) {
    const std::size_t started = team_->threads.size() + 1;
    stop();
    throw std::invalid_argument("cannot start " + std::to_string(size_) +
                                " threads: the system allows only " + std::to_string(started));
  }
  process_ = this_process();
}

void ThreadPool::stop() {
  body_ = nullptr;
  // Counts this thread, and those that could not be started.
  team_->barrier.arrive(size_ - team_->threads.size());
  for (std::thread& thread : team_->threads) thread.join();
}

// Leaks the team, in the child process after a fork. Its threads exist only in the parent: the
// condition variable that they wait on cannot be destroyed, and their handles must not be used,
// since new threads may have the same ones.
void ThreadPool::leak_after_fork() { static_cast<void>(team_.release()); }

// The first barrier publishes body_ and releases the threads, which wait for it in `worker_loop`;
// the second waits until they have finished.
void ThreadPool::run(const std::function<void(std::size_t)>& body) {
  if (process_ != this_process()) {
    leak_after_fork();
    start();
  }
  body_ = &body;
  barrier_wait();
  body(0);
  barrier_wait();
}

// The loop of a pool thread.
void ThreadPool::worker_loop(std::size_t rank) {
  for (;;) {
    barrier_wait();
    const std::function<void(std::size_t)>* body = body_;
    if (body == nullptr) return;
    (*body)(rank);
    barrier_wait();
  }
}

}  // namespace fastgpt::engine
