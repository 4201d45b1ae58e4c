#include "ceilings.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

namespace kt {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

constexpr size_t kLine = 64;
constexpr size_t kAheadBytes = 4096;  // software prefetch distance of the ways that have one
constexpr size_t kChunk = 4 << 20;

// Reads every byte of `bytes`, a multiple of a line, in order.
template <bool Prefetch>
uint64_t read_all(const uint8_t* memory, size_t bytes) {
  uint64_t total = 0;
  for (size_t at = 0; at < bytes; at += kLine) {
    if (Prefetch) __builtin_prefetch(memory + at + kAheadBytes);
    uint64_t words[kLine / sizeof(uint64_t)];
    std::memcpy(words, memory + at, kLine);
    for (uint64_t word : words) total += word;
  }
  return total;
}

// chunk: what a worker takes at a time, handed out in order; 0: an equal slice each. Granite Rapids, 2 threads, 2 to 8 GB:
// without prefetch 20 to 30 GB/s, with it 31 to 37, two or more streams per worker no better.
struct ReadWay {
  uint64_t (*read)(const uint8_t*, size_t);
  size_t chunk;
};

constexpr ReadWay kReadWays[] = {
    {read_all<true>, kChunk}, {read_all<true>, 0}, {read_all<false>, kChunk}, {read_all<false>, 0}};

double read_once(Engine& engine, const uint8_t* memory, size_t bytes, const ReadWay& way) {
  const auto threads = static_cast<size_t>(engine.threads());
  const size_t chunk = way.chunk ? std::min(way.chunk, bytes) : bytes / threads / kLine * kLine;
  const size_t chunks = bytes / chunk;
  std::vector<uint64_t> sums(threads);
  std::atomic<size_t> next{0};
  const auto start = Clock::now();
  engine.pool().run(engine.threads(), [&](int worker) {
    uint64_t sum = 0;
    for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < chunks;) sum += way.read(memory + i * chunk, chunk);
    sums[static_cast<size_t>(worker)] = sum;
  });
  const double elapsed = seconds_since(start);
  volatile uint64_t sink = 0;  // the sums are used, so the reads happen
  for (uint64_t sum : sums) sink = sink + sum;
  return static_cast<double>(chunks * chunk) / elapsed;
}

// Anonymous memory, huge pages asked for; unmapped with the object.
class Mapping {
 public:
  explicit Mapping(size_t bytes) : bytes_(bytes) {
    data_ = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data_ == MAP_FAILED) throw std::runtime_error("cannot map " + std::to_string(bytes) + " bytes to measure bandwidth");
    madvise(data_, bytes, MADV_HUGEPAGE);  // a request: without it the pages are small and the reads a little slower
  }
  ~Mapping() { munmap(data_, bytes_); }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  uint8_t* data() const { return static_cast<uint8_t*>(data_); }

 private:
  void* data_;
  size_t bytes_;
};

struct alignas(64) Tally {
  double operations = 0;
  double seconds = 0;
};

}  // namespace

double measure_bandwidth(Engine& engine, const uint8_t* memory, size_t bytes) {
  std::lock_guard<std::mutex> guard(engine.busy());
  const size_t lines = bytes / kLine * kLine;
  if (lines < kLine * static_cast<size_t>(engine.threads())) {
    throw std::invalid_argument("too little memory to measure bandwidth: " + std::to_string(bytes) + " bytes");
  }
  double best = 0;
  for (int pass = 0; pass < 2; ++pass) {
    for (const ReadWay& way : kReadWays) best = std::max(best, read_once(engine, memory, lines, way));
  }
  return best;
}

double measure_bandwidth(Engine& engine, size_t bytes) {
  const Mapping mapping(std::max(bytes, kLine));
  const size_t slice = bytes / static_cast<size_t>(engine.threads());
  engine.pool().run(engine.threads(), [&](int worker) {  // touched where it will be read
    const size_t from = static_cast<size_t>(worker) * slice;
    std::memset(mapping.data() + from, 1, worker + 1 == engine.threads() ? bytes - from : slice);
  });
  return measure_bandwidth(engine, mapping.data(), bytes);
}

double measure_compute(Engine& engine, double seconds, bool bf16) {
  constexpr int kWindows = 4;
  constexpr int kIterations = 64;  // 64 x 16 KiB of operands: about 25 us on AMX between looks at the clock
  if (!(seconds > 0 && seconds <= 60)) throw std::invalid_argument("seconds must be above 0 and at most 60");
  std::lock_guard<std::mutex> guard(engine.busy());
  const auto peak = bf16 ? engine.kernels().peak_bf16 : engine.kernels().peak_s8;
  const auto threads = static_cast<size_t>(engine.threads());
  constexpr size_t kBytes = kPeakOperandBytes + kPeakResultBytes;
  const Mapping operands(threads * kBytes);
  std::memset(operands.data(), 0x3d, threads * kBytes);  // int8 61, bf16 0.046: no zeros, no denormals
  double best = 0;
  for (int window = 0; window < kWindows; ++window) {
    std::vector<Tally> tallies(threads);
    engine.pool().run(engine.threads(), [&](int worker) {
      const auto index = static_cast<size_t>(worker);
      Tally& tally = tallies[index];
      const auto start = Clock::now();
      while (tally.seconds < seconds / kWindows) {
        tally.operations += static_cast<double>(peak(operands.data() + index * kBytes, kIterations));
        tally.seconds = seconds_since(start);
      }
    });
    double rate = 0;
    for (const Tally& tally : tallies) rate += tally.operations / tally.seconds;
    best = std::max(best, rate);
  }
  return best;
}

}  // namespace kt
