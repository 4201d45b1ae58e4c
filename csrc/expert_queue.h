// Expert layers computed beside a device: a call is submitted and awaited from the device's own stream, by two C functions
// that the stream runs as host functions. Nothing here needs Python, and nothing waits for ever.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "moe.h"

namespace kt {

class ExpertQueue;

// One layer's argument block: host buffers that the stream's copies fill and empty. It must outlive its calls.
struct ExpertCall {
  ExpertQueue* queue;
  ExpertLayer* layer;
  const void* x;  // [rows, hidden_size]
  bool x_is_bf16;
  const int64_t* ids;    // [rows, k]
  const float* weights;  // [rows, k]
  float* out;            // [rows, hidden_size]; written before sync_call() returns, and at no other time
  int rows;
  int k;
  bool is_queued = false;  // the rest is the queue's
  bool is_done = false;
};

extern "C" {
// Host functions of a stream, the argument an ExpertCall. They never throw: what goes wrong is kept in the queue, and
// every later call of the step does nothing.
void kt_submit_call(void* call) noexcept;
void kt_sync_call(void* call) noexcept;
}

// A thread that computes calls in the order of their submission.
class ExpertQueue {
 public:
  struct Stats {
    int64_t calls = 0;
    double busy_s = 0;    // computing
    double waited_s = 0;  // streams held up in sync_call
  };

  explicit ExpertQueue(double timeout_s);
  ~ExpertQueue();
  ExpertQueue(const ExpertQueue&) = delete;
  ExpertQueue& operator=(const ExpertQueue&) = delete;

  void submit(ExpertCall& call) noexcept;
  void sync(ExpertCall& call) noexcept;

  // The call's owner is about to go: takes it out, or waits for it.
  void withdraw(ExpertCall& call);
  // Waits until nothing is in flight. False: something still is after the time.
  bool wait_idle(double seconds);
  // What went wrong first since the last take_error(); empty: nothing.
  std::string take_error();
  Stats stats();

  // For tests: the next call, or the one that many behind it, takes so much longer, or fails with this message.
  void inject(double delay_s, const std::string& error, int skipped = 0);

 private:
  struct Fault {
    double delay_s = 0;
    std::string error;
    int skipped = 0;
  };

  void run();
  void compute(ExpertCall& call, std::unique_lock<std::mutex>& lock);
  void fail(const std::string& error);

  const std::chrono::duration<double> timeout_;
  std::mutex mutex_;
  std::condition_variable wake_, finished_;
  std::deque<ExpertCall*> waiting_;
  std::vector<float> result_;  // the call in progress writes here: its own buffer may have been given up on
  std::string error_;
  Fault fault_;
  Stats stats_;
  bool is_busy_ = false;
  bool is_stopping_ = false;
  std::thread thread_;
};

}  // namespace kt
