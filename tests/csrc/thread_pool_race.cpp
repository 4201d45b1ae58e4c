// Drives the thread pool the way the engine does, for a build with -fsanitize=thread. Exits 1 on a wrong sum.
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <thread>
#include <vector>

#include "thread_pool.h"

namespace {

// Plain (not atomic) writes in one run must be seen by the next run and by the caller.
bool counts_are_exact(int threads, int runs) {
  kt::ThreadPool pool(threads);
  std::vector<int64_t> slots(static_cast<size_t>(threads), 0);
  int64_t expected = 0;
  for (int run = 0; run < runs; ++run) {
    const int active = 1 + run % threads;
    pool.run(active, [&](int worker) { slots[static_cast<size_t>(worker)] += run; });
    expected += static_cast<int64_t>(active) * run;
  }
  int64_t sum = 0;
  for (int64_t slot : slots) sum += slot;
  return sum == expected;
}

// Two phases with a barrier between them: the second reads what the other workers wrote in the first.
bool barrier_publishes(int threads, int runs) {
  kt::ThreadPool pool(threads);
  kt::Barrier barrier(threads);
  std::vector<int> first(static_cast<size_t>(threads), 0);
  std::atomic<int> wrong{0};
  for (int run = 1; run <= runs; ++run) {
    pool.run(threads, [&](int worker) {
      first[static_cast<size_t>(worker)] = run;
      barrier.wait();
      for (int value : first) wrong += value != run;
      barrier.wait();
    });
  }
  return wrong == 0;
}

// Callers on several threads take turns.
bool callers_take_turns(int threads, int runs) {
  kt::ThreadPool pool(threads);
  int64_t total = 0;
  const auto caller = [&] {
    for (int run = 0; run < runs; ++run) {
      pool.run(1, [&](int) { ++total; });
    }
  };
  std::thread other(caller);
  caller();
  other.join();
  return total == 2 * static_cast<int64_t>(runs);
}

}  // namespace

int main() {
  for (int threads : {1, 2, 3, 7}) {
    if (!counts_are_exact(threads, 300) || !barrier_publishes(threads, 40) || !callers_take_turns(threads, 100)) {
      std::printf("wrong result with %d threads\n", threads);
      return 1;
    }
  }
  std::printf("ok\n");
  return 0;
}
