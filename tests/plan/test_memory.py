"""Planned RAM against what kt.load takes, each in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kttools.plan.choice import Choice, open_subject, ram
from tests.conftest import quantize
from tests.forge import config, hub_tensors, save_model

TOKENS = 600
# The first load brings libraries, threads and the allocator's arenas; the second one's growth is the weights.
MEASURE = """
import json, sys, torch
import kttools_runtime as kt
from tests.memory import anonymous_bytes
kt.load(sys.argv[1], threads=1)
before = anonymous_bytes()
model = kt.load(sys.argv[1], threads=1)
loaded = anonymous_bytes()
cache = model.new_cache(int(sys.argv[2]))
tokens = torch.randint(0, model.config.vocab_size, (int(sys.argv[2]),))
model.prefill(tokens, cache)
print(json.dumps({"grown": loaded - before, "total": anonymous_bytes()}))
"""


def measured(bundle: Path, repo: Path) -> dict[str, Any]:
    line = [sys.executable, "-c", MEASURE, str(bundle), str(TOKENS)]
    done = subprocess.run(line, cwd=repo, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def wide_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dense weights of 98 MB, so that the allocator's noise is small beside them."""
    values = config(hidden_size=512, vocab_size=40000, intermediate_size=4096, kv_lora_rank=256)
    directory = tmp_path_factory.mktemp("wide")
    source = save_model(directory / "model", values, hub_tensors(values))
    return quantize(source, directory / "bundle", "--gpu-format", "bf16")


@pytest.mark.parametrize("name", ["nano_bundle", "wide_bundle"])
def test_dense_weights_are_what_load_takes(name: str, request: pytest.FixtureRequest, repo: Path) -> None:
    """Within 3 % and 3 MB; and all anonymous memory stays below the plan, more than a third of it."""
    bundle = request.getfixturevalue(name)
    plan = ram(open_subject(bundle), Choice(None, None, TOKENS, "off", 1))
    found = measured(bundle, repo)
    assert abs(found["grown"] - plan.dense) <= 0.03 * plan.dense + 3e6, (found, plan)
    assert plan.anonymous / 3 < found["total"] <= plan.anonymous, (found, plan)


def test_replicate_counts_a_copy_per_node(nano_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kttools_runtime import _kernels

    monkeypatch.setattr(_kernels, "numa_nodes", lambda: [[0], [1]])
    subject = open_subject(nano_bundle)
    shard, copied = (ram(subject, Choice(None, None, 64, numa, 4)) for numa in ("shard", "replicate"))
    assert sum(shard.numa.node_bytes) == shard.experts
    assert copied.copies == 2 * copied.experts
    assert copied.total - shard.total == copied.copies


def test_cache_grows_by_its_tokens(nano_bundle: Path) -> None:
    subject = open_subject(nano_bundle)
    short, long = (ram(subject, Choice(None, None, n, "off", 1)).cache for n in (1000, 3000))
    assert (short, long) == (1000 * 4 * (64 + 32) * 2, 3000 * 4 * (64 + 32) * 2)
