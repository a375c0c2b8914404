// Threads that wait for work, and meet within it.
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

// Where a team of threads waits until all are there. Meeting takes less than a microsecond while
// everybody is awake; who waits long falls asleep.
class Barrier {
 public:
  explicit Barrier(std::size_t size) : size_(size) {}
  void wait();
  // Counts that many as there, without waiting; returns whether they were the last.
  bool arrive(std::size_t count);

 private:
  void sleep_until_past(std::uint32_t generation);

  const std::size_t size_;
  // Each on a cache line of its own: one is written by all, one is watched by all.
  alignas(64) std::atomic<std::size_t> arrived_{0};
  alignas(64) std::atomic<std::uint32_t> generation_{0};
  alignas(64) std::atomic<std::size_t> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable awake_;
};

// A team of `size` threads, whoever calls `run` among them.
class ThreadPool {
 public:
  // Throws std::invalid_argument if the system cannot start so many.
  explicit ThreadPool(std::size_t size);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  std::size_t size() const { return size_; }

  // Calls body(rank) on each thread, and returns when all have. The body must not throw. One call
  // at a time.
  void run(const std::function<void(std::size_t)>& body);

  // For bodies: returns when all threads have come here.
  void meet() {
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
  void abandon();
  void serve(std::size_t rank);

  const std::size_t size_;
  std::unique_ptr<Team> team_;
  const std::function<void(std::size_t)>* body_ = nullptr;  // null: it is over
  long process_ = 0;
};

}  // namespace fastgpt::engine
