// A device's stream without a device: a thread that runs copies, host functions and computations in the order in which
// they were enqueued. What is proven with it on the CPU is the ordering and the buffers of the real path.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>

namespace kt {

// A point in a stream that other streams can wait for. Recording again moves it.
class SimEvent {
 public:
  uint64_t announce();         // by the host, when the record is enqueued: which point a wait means
  void reach(uint64_t point);  // by the stream that records
  void wait(uint64_t point);   // by a stream that waits
  bool hold(double seconds);   // by the host: until the newest point; false: not reached in time
  uint64_t announced();

 private:
  std::mutex mutex_;
  std::condition_variable reached_;
  uint64_t announced_ = 0;
  uint64_t point_ = 0;
};

class SimStream {
 public:
  using HostFunction = void (*)(void*);

  SimStream();
  ~SimStream();  // runs what is enqueued
  SimStream(const SimStream&) = delete;
  SimStream& operator=(const SimStream&) = delete;

  void host(HostFunction function, void* argument);
  // Kernels and copies. An exception is kept for synchronize(); computations behind it are left out, host functions are
  // not.
  void compute(std::function<void()> work);
  void record(std::shared_ptr<SimEvent> event);
  void wait(std::shared_ptr<SimEvent> event);

  // False: not finished after the time. Rethrows the first exception, once.
  bool synchronize(double seconds);

 private:
  struct Op {
    std::function<void()> work;
    bool is_skippable;
  };

  void enqueue(std::function<void()> work, bool is_skippable);
  void run();

  std::mutex mutex_;
  std::condition_variable wake_, idle_;
  std::deque<Op> ops_;
  std::exception_ptr failure_;
  bool is_busy_ = false;
  bool is_stopping_ = false;
  std::thread thread_;
};

}  // namespace kt
