// A fork-join pool whose caller is one of its workers.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace kt {

// Spins for a moment, then yields: on a machine with as many workers as cores a waiting thread must not hold a core
// that a working one needs.
class Backoff {
 public:
  void pause();

 private:
  int spins_ = 0;
};

// All `threads` callers of wait() leave together. Reusable.
class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}
  void wait();

 private:
  const int threads_;
  std::atomic<int> arrived_{0};
  std::atomic<uint32_t> phase_{0};
};

class ThreadPool {
 public:
  // Throws std::invalid_argument unless 1 <= threads <= 1024, std::runtime_error if the system gives fewer threads than
  // that; those already started have ended then.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return size_; }

  // Throws std::runtime_error in a process that was forked from the pool's own: fork copies no thread, so everything
  // that waits for one would wait for ever, and locks may be held by threads that are not there.
  void check_process() const;

  // Runs task(worker, active) on workers 0..active-1, 0 being the caller; returns when all are done. One run at a time:
  // a second caller waits. Tasks must not throw. Throws what check_process() throws.
  void run(int active, const std::function<void(int)>& task);

 private:
  // Apart, because in a forked process none of it may be destroyed: the condition variable counts sleepers that do not
  // exist there and would wait for them.
  struct Team {
    std::condition_variable wake;
    std::vector<std::thread> workers;
  };

  void worker_loop(int index);
  void stop();

  std::mutex run_mutex_;
  std::mutex sleep_mutex_;
  std::atomic<uint64_t> ticket_{
      0};  // generation << 16 | workers wanted: one word, so that a worker never mixes two runs
  std::atomic<int> pending_{0};
  std::atomic<int> sleepers_{0};
  std::atomic<bool> stopping_{false};
  const std::function<void(int)>* task_ = nullptr;
  const int size_;
  const unsigned forks_;  // of the process, when the pool was made
  std::unique_ptr<Team> team_;
};

}  // namespace kt
