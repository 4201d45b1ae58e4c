#include "engine.h"

#include <algorithm>

#include "dispatch.h"

namespace kt {

namespace {

Topology used(NumaMode numa, const Topology& topology, int threads) {
  Topology nodes = topology;
  nodes.nodes.resize(numa == NumaMode::kOff ? 1 : std::min<size_t>(nodes.nodes.size(), static_cast<size_t>(threads)));
  return nodes;
}

}  // namespace

Engine::Engine(int threads, const std::string& isa, NumaMode numa, const Topology& topology)
    : kernels_(select_table(isa)),
      numa_(numa),
      topology_(used(numa, topology, std::max(1, threads))),
      pool_(threads),
      gemm_(static_cast<size_t>(pool_.size())) {
  step.workers.resize(static_cast<size_t>(pool_.size()));
  if (nodes() == 1) return;
  // The caller's own thread stays free: other libraries' threads would inherit its CPUs.
  pool_.run(pool_.size(), [&](int worker) {
    if (worker > 0) run_on(node(node_of(worker)));
  });
}

StripCounter::Run Engine::share(int strips, int node) const {
  int before = 0;
  for (int n = 0; n < node; ++n) before += workers_on(n);
  const auto cut = [&](int workers) { return static_cast<int>(static_cast<int64_t>(strips) * workers / threads()); };
  return {cut(before), cut(before + workers_on(node))};
}

const KernelTable& Engine::select_table(const std::string& isa) { return select_isa(isa); }

size_t Engine::scratch_bytes() const {
  size_t bytes = 0;
  for (const Buffer* buffer :
       {&stage.int8, &stage.scale, &stage.sum, &stage.bf16, &stage.f32, &stage.blocks, &tiles, &hidden, &hidden_rows,
        &step.normed, &step.projected, &step.inner, &step.heads, &step.out, &step.routed})
    bytes += buffer->capacity();
  for (const GemmScratch& worker : gemm_)
    bytes += worker.c.capacity() + worker.expanded.capacity() + worker.rows.capacity();
  for (const Buffer& worker : step.workers) bytes += worker.capacity();
  return bytes;
}

int Engine::workers_for(size_t weight_bytes, int rows) const {
  // Waking a worker costs about 2 us; a core reads 32 KiB of weights in that time, or multiplies them with 16 rows.
  constexpr size_t kBytesPerWorker = 64 << 10;
  const size_t work = weight_bytes * static_cast<size_t>(std::max(1, rows / 16));
  return static_cast<int>(std::clamp<size_t>(work / kBytesPerWorker, 1, static_cast<size_t>(threads())));
}

}  // namespace kt
