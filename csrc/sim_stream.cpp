#include "sim_stream.h"

#include <utility>

namespace kt {

uint64_t SimEvent::announce() {
  std::lock_guard<std::mutex> lock(mutex_);
  return ++announced_;
}

uint64_t SimEvent::announced() {
  std::lock_guard<std::mutex> lock(mutex_);
  return announced_;
}

void SimEvent::reach(uint64_t point) {
  std::lock_guard<std::mutex> lock(mutex_);
  point_ = point;
  reached_.notify_all();
}

void SimEvent::wait(uint64_t point) {
  std::unique_lock<std::mutex> lock(mutex_);
  reached_.wait(lock, [&] { return point_ >= point; });
}

bool SimEvent::hold(double seconds) {
  std::unique_lock<std::mutex> lock(mutex_);
  return reached_.wait_for(lock, std::chrono::duration<double>(seconds), [&] { return point_ >= announced_; });
}

SimStream::SimStream() : thread_([this] { run(); }) {}

SimStream::~SimStream() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    is_stopping_ = true;
  }
  wake_.notify_all();
  thread_.join();
}

void SimStream::host(HostFunction function, void* argument) {
  enqueue([=] { function(argument); }, false);
}

void SimStream::compute(std::function<void()> work) { enqueue(std::move(work), true); }

void SimStream::record(std::shared_ptr<SimEvent> event) {
  const uint64_t point = event->announce();
  enqueue([event, point] { event->reach(point); }, false);
}

void SimStream::wait(std::shared_ptr<SimEvent> event) {
  const uint64_t point = event->announced();
  enqueue([event, point] { event->wait(point); }, false);
}

bool SimStream::synchronize(double seconds) {
  std::unique_lock<std::mutex> lock(mutex_);
  const bool is_idle =
      idle_.wait_for(lock, std::chrono::duration<double>(seconds), [&] { return ops_.empty() && !is_busy_; });
  if (is_idle && failure_) {
    std::exception_ptr failure;
    std::swap(failure, failure_);
    std::rethrow_exception(failure);
  }
  return is_idle;
}

void SimStream::enqueue(std::function<void()> work, bool is_skippable) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    ops_.push_back({std::move(work), is_skippable});
  }
  wake_.notify_one();
}

void SimStream::run() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    wake_.wait(lock, [&] { return is_stopping_ || !ops_.empty(); });
    if (ops_.empty()) return;
    Op op = std::move(ops_.front());
    ops_.pop_front();
    const bool is_left_out = op.is_skippable && failure_;
    is_busy_ = true;
    lock.unlock();
    std::exception_ptr failure;
    try {
      if (!is_left_out) op.work();
    } catch (...) {
      failure = std::current_exception();
    }
    op.work = nullptr;
    lock.lock();
    is_busy_ = false;
    if (failure && !failure_) failure_ = failure;
    if (ops_.empty()) idle_.notify_all();
  }
}

}  // namespace kt
