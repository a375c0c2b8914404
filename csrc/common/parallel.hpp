// Three ways to run code on several threads: on PyTorch's OpenMP threads (run_team, for_each_tile),
// for training, and on new threads (run_concurrently), for work that takes much longer than
// starting them and that must not need PyTorch. The engine has a pool of its own, since it
// synchronizes its threads a hundred times per token (engine/thread_pool.hpp).
#pragma once

#include <atomic>
#include <cstddef>
#include <exception>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace fastgpt {

// Pauses for a moment within a loop that waits for another thread.
inline void cpu_pause() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_ia32_pause();
#elif defined(__aarch64__) && defined(__GNUC__)
  // `isb` takes some time, like the x86 instruction. The `yield` instruction takes none, so that a
  // limited number of iterations would pass too quickly (measured in
  // https://github.com/rust-lang/rust/pull/84725).
  asm volatile("isb");
#else
  std::this_thread::yield();
#endif
}

// The functions of the GNU OpenMP runtime that PyTorch has loaded: `run` calls `body(data)` on a
// team of threads, and `rank` returns a thread's index in its team. They are looked up at run time,
// because linking a second OpenMP runtime would create a second set of threads that compete with
// PyTorch's for the cores.
struct OpenMp {
  void (*run)(void (*body)(void*), void* data, unsigned threads, unsigned flags) = nullptr;
  int (*rank)() = nullptr;

  static OpenMp find() {
    OpenMp found;
#if defined(__linux__)
    found.run = reinterpret_cast<decltype(run)>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    found.rank = reinterpret_cast<decltype(rank)>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
#endif
    return found;
  }
  bool complete() const { return run != nullptr && rank != nullptr; }
};

// Calls body(rank) concurrently on up to `threads` threads, including the calling one; if no OpenMP
// runtime was found, only body(0) on the calling thread. The body must be correct for any number of
// threads. Returns when all calls have returned.
template <typename Body>
void run_team(unsigned threads, const Body& body) {
  thread_local OpenMp omp;  // looked up again until found, since PyTorch may be loaded later
  if (threads > 1 && !omp.complete()) omp = OpenMp::find();
  if (threads < 2 || !omp.complete()) {
    body(std::size_t{0});
    return;
  }
  struct Team {
    int (*rank)();
    const Body& body;
  } team{omp.rank, body};
  const auto member = [](void* data) {
    const Team& t = *static_cast<const Team*>(data);
    t.body(static_cast<std::size_t>(t.rank()));
  };
  omp.run(member, &team, threads, 0);
}

// Calls body(i) for each i in [0, n) on up to `threads` threads of a team. Scheduling is dynamic:
// each thread takes the next index when it has finished one, so that a preempted thread delays the
// others little.
template <typename Body>
void for_each_tile(std::size_t n, unsigned threads, const Body& body) {
  std::atomic<std::size_t> next{0};
  run_team(n < 2 ? 1 : threads, [&](std::size_t) {
    for (std::size_t i = next.fetch_add(1); i < n; i = next.fetch_add(1)) body(i);
  });
}

// Calls body(i) for each i < count concurrently: the last one on the calling thread, each of the
// others on a new thread, or on the calling one if no more threads can be started. Waits for all of
// them, then rethrows the exception of the lowest i that threw one.
template <typename Body>
void run_concurrently(std::size_t count, const Body& body) {
  std::vector<std::exception_ptr> errors(count);
  const auto guarded = [&](std::size_t i) {
    try {
      body(i);
    } catch (...) {
      errors[i] = std::current_exception();
    }
  };
  std::vector<std::thread> threads;
  threads.reserve(count);
  std::size_t started = 0;
  try {
    for (; started + 1 < count; ++started) threads.emplace_back(guarded, started);
  } catch (const std::system_error&) {  // the loop below runs the rest
  }
  for (; started < count; ++started) guarded(started);
  for (std::thread& thread : threads) thread.join();
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

}  // namespace fastgpt
