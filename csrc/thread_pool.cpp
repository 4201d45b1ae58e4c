#include "thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <chrono>
#include <stdexcept>
#include <string>
#include <system_error>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace kt {
namespace {

constexpr int kSpinsBeforeYield = 2000;  // about 30 us of pauses: longer than a balanced phase waits
constexpr auto kIdleBeforeSleep = std::chrono::microseconds(200);  // between two layers of a decode step
constexpr int kWantedBits = 16;
constexpr uint64_t kWantedMask = (1u << kWantedBits) - 1;

// How often this process is a child: a fork's child counts one more than its parent.
std::atomic<unsigned> forks{0};

unsigned forks_so_far() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { forks.fetch_add(1, std::memory_order_relaxed); });
  static_cast<void>(registered);
  return forks.load(std::memory_order_relaxed);
}

int checked_size(int threads) {
  if (threads < 1 || threads > 1024) {
    throw std::invalid_argument("threads must be 1 to 1024, got " + std::to_string(threads));
  }
  return threads;
}

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

ThreadPool::ThreadPool(int threads)
    : size_(checked_size(threads)), forks_(forks_so_far()), team_(std::make_unique<Team>()) {
  team_->workers.reserve(static_cast<size_t>(threads) - 1);
  for (int i = 1; i < threads; ++i) {
    try {
      team_->workers.emplace_back([this, i] { worker_loop(i); });
    } catch (const std::system_error& error) {
      stop();
      throw std::runtime_error("the system started " + std::to_string(i - 1) + " of " + std::to_string(threads - 1) +
                               " worker threads (" + error.code().message() +
                               "): ask for fewer threads, or raise the limit on processes or memory");
    } catch (...) {
      stop();
      throw;
    }
  }
}

ThreadPool::~ThreadPool() {
  if (forks.load(std::memory_order_relaxed) == forks_) {
    stop();
  } else {
    static_cast<void>(team_.release());
  }
}

void ThreadPool::stop() {
  {
    std::lock_guard<std::mutex> lock(sleep_mutex_);
    stopping_.store(true);
  }
  team_->wake.notify_all();
  for (std::thread& worker : team_->workers) worker.join();
  team_->workers.clear();
}

void ThreadPool::check_process() const {
  if (forks.load(std::memory_order_relaxed) == forks_) return;
  throw std::runtime_error(
      "this process was forked from the one whose engine this is, and its threads stayed there: "
      "make the engine after the fork, or start the process by spawning");
}

void ThreadPool::run(int active, const std::function<void(int)>& task) {
  check_process();
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
    team_->wake.notify_all();
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
    team_->wake.wait(lock, [&] { return stopping_.load() || ticket_.load(std::memory_order_seq_cst) != seen; });
    sleepers_.fetch_sub(1, std::memory_order_seq_cst);
    idle_since = std::chrono::steady_clock::now();
  }
}

}  // namespace kt
