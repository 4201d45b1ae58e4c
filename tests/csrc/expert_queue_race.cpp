// Streams, calls and faults in random order on the expert queue, for a build with -fsanitize=thread. The layer is a
// stand-in that is exact: y = sum over chosen ids of weight * (id + 1) * x. Exits 1 where something is wrong.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#include "expert_queue.h"
#include "sim_stream.h"

namespace kt {

ExpertLayer::ExpertLayer(std::shared_ptr<Engine>, int hidden_size, int, std::vector<ExpertBlob>)
    : hidden_size_(hidden_size), intermediate_(0) {}

void ExpertLayer::forward(const Input& x, const Routing& routing, float* out) {
  for (int r = 0; r < x.rows; ++r) {
    float scale = 0;
    for (int j = 0; j < routing.k; ++j) {
      const int64_t id = routing.ids[r * routing.k + j];
      if (id > 1000) throw std::invalid_argument("id out of range");
      if (id >= 0) scale += routing.weights[r * routing.k + j] * static_cast<float>(id + 1);
    }
    for (int i = 0; i < hidden_size_; ++i) out[r * hidden_size_ + i] = scale * static_cast<const float*>(x.row(r))[i];
  }
}

}  // namespace kt

namespace {

constexpr int kHidden = 16, kTop = 3;

void check(bool holds, const char* what) {
  if (holds) return;
  std::printf("wrong: %s\n", what);
  std::exit(1);
}

// The buffers of one layer on both sides of a handshake.
struct Slot {
  Slot(kt::ExpertQueue& queue, kt::ExpertLayer& layer)
      : x(kHidden), out(kHidden), result(kHidden), ids(kTop), weights(kTop, 0.5f) {
    call = {&queue, &layer, x.data(), false, ids.data(), weights.data(), out.data(), 1, kTop};
  }
  float expected(int step) const {
    float scale = 0;
    for (int64_t id : planned) scale += id < 0 ? 0 : 0.5f * static_cast<float>(id + 1);
    return scale * static_cast<float>(step + 1);
  }
  std::vector<float> x, out, result;
  std::vector<int64_t> ids, planned;
  std::vector<float> weights;
  kt::ExpertCall call;
};

void enqueue_submit(kt::SimStream& stream, Slot& slot, int step) {
  const std::vector<int64_t> ids = slot.planned;
  stream.compute([&slot, ids, step] {
    slot.ids = ids;
    slot.x.assign(kHidden, static_cast<float>(step + 1));
  });
  stream.host(kt::kt_submit_call, &slot.call);
}

void enqueue_sync(kt::SimStream& stream, Slot& slot) {
  stream.host(kt::kt_sync_call, &slot.call);
  stream.compute([&slot] { slot.result = slot.out; });
}

// Several layers in flight on two streams, submitted and awaited in random order.
void interleave(int steps) {
  kt::ExpertQueue queue(60);
  kt::ExpertLayer layer(nullptr, kHidden, 0, {});
  kt::SimStream streams[2];
  std::vector<std::unique_ptr<Slot>> slots;
  for (int i = 0; i < 6; ++i) slots.push_back(std::make_unique<Slot>(queue, layer));
  std::mt19937 random(1);
  for (int step = 0; step < steps; ++step) {
    std::vector<Slot*> in_flight[2];
    for (size_t i = 0; i < slots.size(); ++i) {
      const int side = static_cast<int>(random() % 2);
      slots[i]->planned = {static_cast<int64_t>(random() % 8), -1, static_cast<int64_t>(random() % 8)};
      enqueue_submit(streams[side], *slots[i], step);
      in_flight[side].push_back(slots[i].get());
      if (random() % 2 == 0) {
        std::vector<Slot*>& some = in_flight[side];
        const size_t which = random() % some.size();
        enqueue_sync(streams[side], *some[which]);
        some.erase(some.begin() + static_cast<std::ptrdiff_t>(which));
      }
    }
    for (int side = 0; side < 2; ++side) {
      for (Slot* slot : in_flight[side]) enqueue_sync(streams[side], *slot);
    }
    for (kt::SimStream& stream : streams) check(stream.synchronize(60), "a stream hangs");
    check(queue.take_error().empty(), "an error without a reason");
    for (const auto& slot : slots) {
      for (float value : slot->result) check(value == slot->expected(step), "results are mixed");
    }
  }
}

// A failing layer, a slow one, and misuse: an error every time, and the next step is sound again.
void faults(int steps) {
  kt::ExpertQueue queue(0.02);
  kt::ExpertLayer layer(nullptr, kHidden, 0, {});
  Slot first(queue, layer), second(queue, layer);
  kt::SimStream stream;
  for (int step = 0; step < steps; ++step) {
    first.planned = {step % 4 == 0 ? 5000 : 1, 2, -1};
    second.planned = {3, -1, -1};
    if (step % 4 == 1) queue.inject(0.06, "");
    if (step % 4 == 2) queue.inject(0, "planted");
    for (Slot* slot : {&first, &second}) {
      enqueue_submit(stream, *slot, step);
      enqueue_sync(stream, *slot);
    }
    check(stream.synchronize(60), "a stream hangs after a fault");
    check(queue.wait_idle(60), "the queue hangs after a fault");
    const std::string error = queue.take_error();
    check(error.empty() == (step % 4 == 3), "an error is lost or made up");
    if (step % 4 == 3) check(second.result[0] == second.expected(step), "no result after a fault");
  }
  stream.host(kt::kt_sync_call, &first.call);
  check(stream.synchronize(60) && !queue.take_error().empty(), "an await without a submit passes");
}

}  // namespace

int main() {
  const char* count = std::getenv("KT_RACE_STEPS");
  interleave(count ? std::atoi(count) : 1000);
  faults(40);
  std::printf("ok\n");
  return 0;
}
