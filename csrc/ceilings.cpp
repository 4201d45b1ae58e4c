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
constexpr size_t kChunk = 4 << 20;
constexpr size_t kUnit = 8 * kLine;  // what the largest number of streams reads in one step

// Reads `bytes`, a multiple of kUnit, as Streams linear streams side by side, asking for each AheadBytes in advance.
template <int Streams, int AheadBytes>
uint64_t read_streams(const uint8_t* memory, size_t bytes) {
  const size_t length = bytes / Streams;
  uint64_t total[Streams] = {};
  for (size_t at = 0; at < length; at += kLine) {
    for (int s = 0; s < Streams; ++s) {
      const uint8_t* line = memory + s * length + at;
      __builtin_prefetch(line + AheadBytes);
      uint64_t words[kLine / sizeof(uint64_t)];
      std::memcpy(words, line, kLine);
      for (uint64_t word : words) total[s] += word;
    }
  }
  uint64_t sum = 0;
  for (uint64_t part : total) sum += part;
  return sum;
}

// chunk: what a worker takes at a time, handed out in order; 0: an equal slice each.
struct ReadWay {
  uint64_t (*read)(const uint8_t*, size_t);
  size_t chunk;
};

// Granite Rapids, 2 threads, 2 to 8 GB: one stream is best in huge pages (31 to 37 GB/s, small pages 18 to 21), several
// near streams in small ones (25 to 30). Without prefetch 14 to 28, so there is no such way.
constexpr ReadWay kReadWays[] = {{read_streams<1, 4096>, kChunk},
                                 {read_streams<1, 4096>, 0},
                                 {read_streams<4, 1024>, 0},
                                 {read_streams<8, 1024>, kChunk}};

double read_once(Engine& engine, const uint8_t* memory, size_t bytes, const ReadWay& way) {
  const auto threads = static_cast<size_t>(engine.threads());
  const size_t chunk = way.chunk ? std::min(way.chunk, bytes) : bytes / threads / kUnit * kUnit;
  const size_t chunks = bytes / chunk;
  std::vector<uint64_t> sums(threads);
  std::atomic<size_t> next{0};
  const auto start = Clock::now();
  engine.pool().run(engine.threads(), [&](int worker) {
    uint64_t sum = 0;
    for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < chunks;)
      sum += way.read(memory + i * chunk, chunk);
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
    if (data_ == MAP_FAILED)
      throw std::runtime_error("cannot map " + std::to_string(bytes) + " bytes to measure bandwidth");
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
  const size_t whole = bytes / kUnit * kUnit;
  if (whole < kUnit * static_cast<size_t>(engine.threads())) {
    throw std::invalid_argument("too little memory to measure bandwidth: " + std::to_string(bytes) + " bytes");
  }
  double best = 0;
  for (int pass = 0; pass < 2; ++pass) {
    for (const ReadWay& way : kReadWays) best = std::max(best, read_once(engine, memory, whole, way));
  }
  return best;
}

double measure_bandwidth(Engine& engine, size_t bytes) {
  const Mapping mapping(std::max(bytes, kUnit));
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
