// Which CPUs are near which memory, and asking the OS for both. Every request is a wish: where the OS refuses (a
// container, a policy), work goes on without it.
#pragma once

#include <cstddef>
#include <vector>

namespace kt {

// Where expert weights go on a machine of several memory nodes.
enum class NumaMode {
  kOff,        // one node, whatever the machine
  kShard,      // each node holds and multiplies its strips of every expert; nothing is held twice
  kReplicate,  // each node holds a copy of everything
};

constexpr int kMaxNodes = 16;

struct Topology {
  struct Node {
    int id;  // the OS's number; -1: simulated
    std::vector<int> cpus;
  };
  std::vector<Node> nodes;  // at least one
};

// Nodes with CPUs that this process may use; a single one where the OS tells nothing.
Topology system_topology();
// `count` nodes that share all CPUs, so that the split can be tested on any machine.
Topology simulated_topology(int count);

// Lets the calling thread run on the node's CPUs only. False if refused or simulated.
bool run_on(const Topology::Node& node);

// Makes [data, data + bytes) resident, from the calling thread, so that pages not in memory yet come to its node; asks
// for pages elsewhere to be moved to `node`. Read only.
void make_resident(const void* data, size_t bytes, const Topology::Node& node);

}  // namespace kt
