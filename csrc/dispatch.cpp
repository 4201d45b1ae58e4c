#include "dispatch.h"

#include <stdexcept>

#include "blocks.h"
#include "cpu_features.h"

namespace kt {
namespace {

#if defined(__x86_64__)
// AMX adds tiles to AVX-512: single rows, epilogues and quantisation are the same code.
KernelTable with_tiles(const KernelTable& base, const KernelTable& tiles) {
  KernelTable merged = base;
  merged.name = tiles.name;
  merged.required |= tiles.required;
  merged.tile_configure = tiles.tile_configure;
  merged.tile_release = tiles.tile_release;
  merged.tile_s8 = tiles.tile_s8;
  merged.tile_bf16 = tiles.tile_bf16;
  merged.tile_min_rows = tiles.tile_min_rows;
  merged.peak_s8 = tiles.peak_s8;
  merged.peak_bf16 = tiles.peak_bf16;
  return merged;
}
#endif

KernelTable with_blocks(const KernelTable& base, const BlockTable& blocks) {
  KernelTable merged = base;
  merged.blocks = &blocks;
  return merged;
}

std::vector<IsaStatus> detect_tables() {
  std::vector<const KernelTable*> tables;
#if defined(__x86_64__)
  static const KernelTable avx2 = with_blocks(kAvx2Table, kAvx2Blocks);
  static const KernelTable avx512 = with_blocks(kAvx512Table, kAvx512Blocks);
  static const KernelTable amx = with_tiles(avx512, kAmxTable);
  tables = {&amx, &avx512, &avx2};
#endif
  static const KernelTable scalar = with_blocks(kScalarTable, kScalarBlocks);
  tables.push_back(&scalar);
  std::vector<IsaStatus> status;
  for (const KernelTable* table : tables) {
    status.push_back({table, missing_features(table->required, cpu_features())});
  }
  return status;
}

}  // namespace

const std::vector<IsaStatus>& isa_status() {
  static const std::vector<IsaStatus> status = detect_tables();
  return status;
}

const KernelTable& select_isa(const std::string& name) {
  std::string valid;
  for (const IsaStatus& isa : isa_status()) {
    if (!isa.missing.empty()) {
      if (name == isa.table->name) {
        std::string lacks;
        for (const std::string& feature : isa.missing) lacks += (lacks.empty() ? "" : ", ") + feature;
        throw std::invalid_argument("isa '" + name + "' cannot run on this CPU: it lacks " + lacks);
      }
      continue;
    }
    if (name.empty() || name == isa.table->name) return *isa.table;
    valid += (valid.empty() ? "" : ", ") + std::string(isa.table->name);
  }
  throw std::invalid_argument("unknown isa '" + name + "': this CPU runs " + valid);
}

}  // namespace kt
