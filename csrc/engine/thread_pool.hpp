// A pool of threads with a low-latency barrier.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace fastgpt::engine {

// A reusable barrier for a team of threads. Waiting threads spin first, so that passing the barrier
// takes less than a microsecond while all of them are running; after a while they sleep.
//
// Each passage of the barrier is a generation. `arrived_` counts the threads of the current one;
// the last to arrive resets it and increments `generation_`, which releases the others.
class Barrier {
 public:
  explicit Barrier(std::size_t size) : size_(size) {}
  // Returns when all threads of the team have arrived.
  void wait();
  // Counts `count` threads as arrived, without waiting. Returns whether they were the last.
  bool arrive(std::size_t count);

 private:
  void sleep_until_past(std::uint32_t generation);

  const std::size_t size_;
  // Each is on its own cache line: all threads write arrived_ while those that wait poll
  // generation_.
  alignas(64) std::atomic<std::size_t> arrived_{0};
  alignas(64) std::atomic<std::uint32_t> generation_{0};
  alignas(64) std::atomic<std::size_t> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable awake_;
};

// A team of `size` threads, including the one that calls `run`. It may be used after a fork: the
// child process starts new threads.
class ThreadPool {
 public:
  // Throws std::invalid_argument if the system cannot start that many threads.
  explicit ThreadPool(std::size_t size);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  std::size_t size() const { return size_; }

  // Calls body(rank) on each thread, rank 0 on the calling one, and returns when all calls have.
  // The body must not throw. Calls to `run` must not overlap.
  void run(const std::function<void(std::size_t)>& body);

  // Synchronizes the team, within a body: returns when all threads have called it.
  void barrier_wait() {
    if (size_ > 1) team_->barrier.wait();
  }

 private:
  struct Team {
    explicit Team(std::size_t size) : barrier(size) {}
    Barrier barrier;
    std::vector<std::thread> threads;
  };

  void start();
  void stop();
  void leak_after_fork();
  void worker_loop(std::size_t rank);

  const std::size_t size_;
  std::unique_ptr<Team> team_;
  const std::function<void(std::size_t)>* body_ = nullptr;  // null: threads exit
  long process_ = 0;                                        // that started the threads
};

}  // namespace fastgpt::engine
