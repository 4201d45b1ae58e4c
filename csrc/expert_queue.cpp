#include "expert_queue.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <sstream>
#include <stdexcept>

namespace kt {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

}  // namespace

extern "C" {
void kt_submit_call(void* call) noexcept {
  auto& own = *static_cast<ExpertCall*>(call);
  own.queue->submit(own);
}

void kt_sync_call(void* call) noexcept {
  auto& own = *static_cast<ExpertCall*>(call);
  own.queue->sync(own);
}
}

ExpertQueue::ExpertQueue(double timeout_s) : timeout_(timeout_s) {
  if (!(timeout_s > 0 && timeout_s <= 86400))
    throw std::invalid_argument("timeout must be more than 0 s, at most a day");
  thread_ = std::thread([this] { run(); });
}

ExpertQueue::~ExpertQueue() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    is_stopping_ = true;
  }
  wake_.notify_all();
  thread_.join();
}

void ExpertQueue::submit(ExpertCall& call) noexcept {
  std::lock_guard<std::mutex> lock(mutex_);
  if (call.is_queued) return fail("a call was submitted while it was in flight");
  call.is_done = false;
  if (!error_.empty()) return;  // the step is lost: its other calls need not be computed
  call.is_queued = true;
  waiting_.push_back(&call);
  wake_.notify_one();
}

void ExpertQueue::sync(ExpertCall& call) noexcept {
  const auto start = Clock::now();
  std::unique_lock<std::mutex> lock(mutex_);
  if (!call.is_queued && !call.is_done) fail("a call was awaited that was not submitted");
  const auto until = start + std::chrono::duration_cast<Clock::duration>(timeout_);
  const bool is_over = finished_.wait_until(lock, until, [&] { return !call.is_queued || !error_.empty(); });
  if (!is_over) {
    std::ostringstream seconds;
    seconds << timeout_.count();
    fail("the experts of a layer took longer than " + seconds.str() + " s");
  }
  call.is_done = false;
  stats_.waited_s += seconds_since(start);
}

void ExpertQueue::withdraw(ExpertCall& call) {
  std::unique_lock<std::mutex> lock(mutex_);
  const auto place = std::find(waiting_.begin(), waiting_.end(), &call);
  if (place != waiting_.end()) {
    waiting_.erase(place);
    call.is_queued = false;
  }
  finished_.wait(lock, [&] { return !call.is_queued; });
}

bool ExpertQueue::wait_idle(double seconds) {
  std::unique_lock<std::mutex> lock(mutex_);
  return finished_.wait_for(lock, std::chrono::duration<double>(seconds),
                            [&] { return waiting_.empty() && !is_busy_; });
}

std::string ExpertQueue::take_error() {
  std::lock_guard<std::mutex> lock(mutex_);
  std::string error;
  error.swap(error_);
  return error;
}

ExpertQueue::Stats ExpertQueue::stats() {
  std::lock_guard<std::mutex> lock(mutex_);
  return stats_;
}

void ExpertQueue::inject(double delay_s, const std::string& error, int skipped) {
  std::lock_guard<std::mutex> lock(mutex_);
  fault_ = {delay_s, error, skipped};
}

void ExpertQueue::run() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    wake_.wait(lock, [&] { return is_stopping_ || !waiting_.empty(); });
    if (is_stopping_) return;
    ExpertCall& call = *waiting_.front();
    waiting_.pop_front();
    is_busy_ = true;
    if (error_.empty()) compute(call, lock);
    is_busy_ = false;
    call.is_queued = false;
    finished_.notify_all();
  }
}

void ExpertQueue::compute(ExpertCall& call, std::unique_lock<std::mutex>& lock) {
  Fault fault;
  if (fault_.skipped > 0) {
    --fault_.skipped;
  } else {
    std::swap(fault, fault_);
  }
  lock.unlock();
  const auto start = Clock::now();
  std::string error;
  const size_t floats = static_cast<size_t>(call.rows) * static_cast<size_t>(call.layer->hidden_size());
  try {
    if (fault.delay_s > 0) std::this_thread::sleep_for(std::chrono::duration<double>(fault.delay_s));
    if (!fault.error.empty()) throw std::runtime_error(fault.error);
    if (result_.size() < floats) result_.resize(floats);
    const Input x = {call.x, call.x_is_bf16, call.rows, call.layer->hidden_size()};
    call.layer->forward(x, {call.ids, call.weights, call.k}, result_.data());
  } catch (const std::exception& failure) {
    error = failure.what();
    if (error.empty()) error = "unknown error";
  }
  const double taken = seconds_since(start);
  lock.lock();
  stats_.calls += 1;
  stats_.busy_s += taken;
  if (!error.empty()) return fail(error);
  if (!error_.empty()) return;  // given up meanwhile: nobody may be surprised by a late result
  std::memcpy(call.out, result_.data(), floats * sizeof(float));
  call.is_done = true;
}

// The first error is the reason; what follows are its consequences.
void ExpertQueue::fail(const std::string& error) {
  if (error_.empty()) error_ = error;
  finished_.notify_all();
}

}  // namespace kt
