"""A pack is used where it is mapped: no second copy in memory, and a token reads its own experts only."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kttools_runtime import _kernels
from kttools_runtime.pack_writer import PackWriter

HIDDEN, INTERMEDIATE = 1024, 512
SMALL, LARGE = 8, 256  # experts; LARGE is 405 MB of int8
MIB = 1 << 20

# Prints what one process pays to map a pack and send one token through 8 of its experts.
PROBE = """
import json, sys
import torch
from kttools_runtime import ExpertEngine

def resident():
    with open("/proc/self/status") as lines:
        sizes = dict(line.split(":", 1) for line in lines)
    return [int(sizes[key].split()[0]) * 1024 for key in ("RssAnon", "RssFile")]

torch.set_num_threads(1)
engine = ExpertEngine(2)
x = torch.ones((1, 1024))
ids = torch.arange(8).reshape(1, 8)
weights = torch.full((1, 8), 0.125)
warm_up = engine.layer_from_tensors(*torch.ones((3, 1, 64, 64)))
warm_up.forward(torch.ones((1, 64)), ids[:, :1], weights[:, :1])
anonymous, mapped = resident()
layer = engine.layer_from_pack(sys.argv[1])
layer.forward(x, ids, weights)
touched = resident()[1] - mapped
# every expert, so that a lazy copy would show
all_ids = torch.arange(layer.num_experts).reshape(1, -1)
layer.forward(x, all_ids, torch.full(all_ids.shape, 0.01))
print(json.dumps({"anonymous": resident()[0] - anonymous, "touched": touched}))
"""


def write_pack(path: Path, experts: int) -> None:
    """Experts of random weights, all the same: the content does not matter here, the bytes do."""
    rng = np.random.default_rng(5)
    gate, down = (
        rng.standard_normal(s, dtype=np.float32) for s in ((INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE))
    )
    blob = np.zeros(_kernels.expert_bytes("int8", HIDDEN, INTERMEDIATE), dtype=np.uint8)
    _kernels.pack_expert("int8", gate, gate, down, blob)
    with PackWriter(
        path, layer=1, hidden_size=HIDDEN, moe_intermediate_size=INTERMEDIATE, formats=["int8"] * experts
    ) as writer:
        for expert in range(experts):
            writer.write(expert, blob)


def probe(path: Path) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(path)], capture_output=True, text=True, check=True
    )
    return dict(json.loads(done.stdout))


@pytest.mark.slow
def test_large_pack_is_mapped(tmp_path: Path) -> None:
    small, large = tmp_path / "small.ktpack", tmp_path / "large.ktpack"
    write_pack(small, SMALL)
    write_pack(large, LARGE)
    at_small, at_large = probe(small), probe(large)
    # A copy would be 405 MB of anonymous memory; scratch and Python objects are a few.
    assert large.stat().st_size > 380 * MIB
    assert at_large["anonymous"] < 32 * MIB, at_large
    # The first token touches its own experts and the header, however large the pack around them.
    assert at_large["touched"] < at_small["touched"] + 4 * MIB, (at_small, at_large)
