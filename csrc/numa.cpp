#include "numa.h"

#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <sstream>
#include <string>

namespace kt {
namespace {

constexpr int kMostNodeIds = 1024;  // of Linux (CONFIG_NODES_SHIFT 10)

// "0-3,8" as numbers.
std::vector<int> parse_list(const std::string& text) {
  std::vector<int> numbers;
  std::stringstream parts(text);
  for (std::string part; std::getline(parts, part, ',');) {
    int first = 0, last = 0;
    const int found = std::sscanf(part.c_str(), "%d-%d", &first, &last);
    if (found < 1) continue;
    for (int n = first; n <= (found == 2 ? last : first); ++n) numbers.push_back(n);
  }
  return numbers;
}

std::string first_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

std::vector<int> allowed_cpus() {
  cpu_set_t set;
  std::vector<int> cpus;
  if (sched_getaffinity(0, sizeof set, &set) != 0) return cpus;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
  }
  return cpus;
}

}  // namespace

Topology system_topology() {
  const std::string root = "/sys/devices/system/node/";
  const std::vector<int> allowed = allowed_cpus();
  Topology topology;
  for (int id : parse_list(first_line(root + "online"))) {
    std::vector<int> cpus;
    for (int cpu : parse_list(first_line(root + "node" + std::to_string(id) + "/cpulist"))) {
      if (std::find(allowed.begin(), allowed.end(), cpu) != allowed.end()) cpus.push_back(cpu);
    }
    if (!cpus.empty() && topology.nodes.size() < kMaxNodes) topology.nodes.push_back({id, cpus});
  }
  if (topology.nodes.empty()) topology.nodes.push_back({-1, allowed});
  return topology;
}

Topology simulated_topology(int count) {
  Topology topology;
  for (int i = 0; i < count; ++i) topology.nodes.push_back({-1, allowed_cpus()});
  return topology;
}

bool run_on(const Topology::Node& node) {
  if (node.id < 0) return false;
  cpu_set_t set;
  CPU_ZERO(&set);
  for (int cpu : node.cpus) CPU_SET(cpu, &set);
  return sched_setaffinity(0, sizeof set, &set) == 0;  // 0: this thread
}

void make_resident(const void* data, size_t bytes, const Topology::Node& node) {
  if (bytes == 0) return;
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes + page - 1) / page * page;
#ifdef SYS_mbind
  if (node.id >= 0 && node.id < kMostNodeIds) {
    constexpr int kPreferred = 1, kMove = 1 << 1, kBits = 8 * sizeof(unsigned long);
    unsigned long mask[kMostNodeIds / kBits] = {};
    mask[node.id / kBits] = 1ul << (node.id % kBits);
    syscall(SYS_mbind, begin, end - begin, kPreferred, mask, kMostNodeIds + 1, kMove);
  }
#endif
#ifdef MADV_POPULATE_READ
  if (madvise(reinterpret_cast<void*>(begin), end - begin, MADV_POPULATE_READ) == 0) return;
#endif
  // Kernels before 5.14.
  const volatile char* at = static_cast<const char*>(data);
  for (size_t i = 0; i < bytes; i += page) (void)at[i];
}

}  // namespace kt
