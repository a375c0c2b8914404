// Parallel loops on PyTorch's OpenMP threads.
#pragma once

#include <cstddef>

#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace fastgpt {

// The functions of the GNU OpenMP runtime that PyTorch has loaded: `run` calls `body(data)` on a
// team of threads, and `rank` and `size` return a thread's index in its team and the size of the
// team. They are looked up at run time, because linking a second OpenMP runtime would create a
// second set of threads that compete with PyTorch's for the cores.
struct OpenMp {
  void (*run)(void (*body)(void*), void* data, unsigned threads, unsigned flags) = nullptr;
  int (*rank)() = nullptr;
  int (*size)() = nullptr;

  static OpenMp find() {
    OpenMp found;
#if defined(__linux__)
    found.run = reinterpret_cast<decltype(run)>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    found.rank = reinterpret_cast<decltype(rank)>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
    found.size = reinterpret_cast<decltype(size)>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));
#endif
    return found;
  }
  bool complete() const { return run != nullptr && rank != nullptr && size != nullptr; }
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

// Splits [0, n) into contiguous parts and calls body(begin, end) for each: one part per thread if
// an OpenMP runtime was found and n is large enough, otherwise body(0, n) on the calling thread.
template <typename Body>
void parallel_for(std::size_t n, unsigned threads, const Body& body) {
  constexpr std::size_t kMinBytesPerThread = 16384;
  const OpenMp omp = n < 2 * kMinBytesPerThread || threads < 2 ? OpenMp{} : OpenMp::find();
  if (!omp.complete()) {
    body(std::size_t{0}, n);
    return;
  }
  struct Team {
    const OpenMp& omp;
    const Body& body;
    std::size_t n;
  } team{omp, body, n};
  const auto member = [](void* data) {
    const Team& t = *static_cast<const Team*>(data);
    const auto size = static_cast<std::size_t>(t.omp.size());
    const auto rank = static_cast<std::size_t>(t.omp.rank());
    t.body(t.n * rank / size, t.n * (rank + 1) / size);
  };
  omp.run(member, &team, threads, 0);
}

}  // namespace fastgpt
