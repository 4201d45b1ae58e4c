#include "thread_pool.h"

#include <sched.h>

#include <chrono>
#include <stdexcept>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace kt {
namespace {

constexpr int kSpinsBeforeYield = 2000;  // about 30 us of pauses: longer than a balanced phase waits
constexpr auto kIdleBeforeSleep = std::chrono::microseconds(200);  // between two layers of a decode step
constexpr int kWantedBits = 16;
constexpr uint64_t kWantedMask = (1u << kWantedBits) - 1;

inline void cpu_pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

}  // namespace

void Backoff::pause() {
  if (++spins_ < kSpinsBeforeYield) {
    cpu_pause();
  } else {
    sched_yield();
  }
}

void Barrier::wait() {
  const uint32_t phase = phase_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1, std::memory_order_release);
    return;
  }
  Backoff backoff;
  while (phase_.load(std::memory_order_acquire) == phase) backoff.pause();
}

ThreadPool::ThreadPool(int threads) {
  if (threads < 1 || threads > 1024) {
    throw std::invalid_argument("threads must be 1 to 1024, got " + std::to_string(threads));
  }
  for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { worker_loop(i); });
}

ThreadPool::~ThreadPool() {
  {
    std::lock_guard<std::mutex> lock(sleep_mutex_);
    stopping_.store(true);
  }
  wake_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::run(int active, const std::function<void(int)>& task) {
  std::lock_guard<std::mutex> guard(run_mutex_);
  active = active < 1 ? 1 : (active > size() ? size() : active);
  if (active == 1) {
    task(0);
    return;
  }
  task_ = &task;
  pending_.store(active - 1, std::memory_order_relaxed);
  const uint64_t generation = (ticket_.load(std::memory_order_relaxed) >> kWantedBits) + 1;
  ticket_.store(generation << kWantedBits | static_cast<uint64_t>(active - 1), std::memory_order_seq_cst);
  if (sleepers_.load(std::memory_order_seq_cst) > 0) {
    std::lock_guard<std::mutex> lock(sleep_mutex_);
    wake_.notify_all();
  }
  task(0);
  Backoff backoff;
  while (pending_.load(std::memory_order_acquire) > 0) backoff.pause();
}

void ThreadPool::worker_loop(int index) {
  uint64_t seen = 0;
  auto idle_since = std::chrono::steady_clock::now();
  int spins = 0;
  while (!stopping_.load(std::memory_order_relaxed)) {
    const uint64_t ticket = ticket_.load(std::memory_order_acquire);
    if (ticket != seen) {
      seen = ticket;
      if (static_cast<uint64_t>(index) <= (ticket & kWantedMask)) {
        (*task_)(index);
        pending_.fetch_sub(1, std::memory_order_release);
      }
      idle_since = std::chrono::steady_clock::now();
      spins = 0;
      continue;
    }
    cpu_pause();
    if (++spins % 256 != 0) continue;
    sched_yield();
    if (std::chrono::steady_clock::now() - idle_since < kIdleBeforeSleep) continue;
    std::unique_lock<std::mutex> lock(sleep_mutex_);
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    wake_.wait(lock, [&] { return stopping_.load() || ticket_.load(std::memory_order_seq_cst) != seen; });
    sleepers_.fetch_sub(1, std::memory_order_seq_cst);
    idle_since = std::chrono::steady_clock::now();
  }
}

}  // namespace kt
