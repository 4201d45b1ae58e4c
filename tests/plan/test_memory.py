"""Planned RAM against what a process takes, each in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kttools.plan.choice import Choice, needs_of, open_subject
from kttools.plan.memory import Machine
from tests.conftest import quantize
from tests.forge import config, hub_tensors, save_model

HERE = Machine(1 << 40, (), 1)
# The peak of a process that fills caches of growing length, and the plan of each before anything is loaded.
MEASURE = """
import json, sys
import torch
import kttools_runtime as kt
from kttools.plan.choice import Choice, needs_of, open_subject
from kttools.plan.memory import Machine
from kttools_runtime.footprint import TOKENIZER_BYTES, TOKENIZER_FACTOR
from pathlib import Path
from tests.memory import anonymous_bytes, peak_rss_bytes
subject, lengths = open_subject(Path(sys.argv[1])), json.loads(sys.argv[2])
plans = [needs_of(subject, Choice(None, None, n, "off", 1), Machine(1 << 40, (), 1)) for n in lengths]
files = subject.layout(Choice(None, None, 1, "off", 1)).tokenizer_bytes
tokenizer = TOKENIZER_BYTES + TOKENIZER_FACTOR * files
before = anonymous_bytes()
model = kt.load(sys.argv[1], threads=1, check_memory=False)
rows, grown = [], anonymous_bytes() - before
generator = torch.Generator().manual_seed(0)
for length, plan in zip(lengths, plans):
    tokens = torch.randint(0, model.config.vocab_size, (length - 1,), generator=generator)
    cache = model.new_cache(length)
    model.prefill(tokens, cache)
    model.decode(1, cache)
    rows.append([plan.ram_total - tokenizer, peak_rss_bytes(), plan.ram.dense])
print(json.dumps({"rows": rows, "grown": grown}))
"""
CHAT = """
import json, sys
from pathlib import Path
from kttools import cli
from kttools.plan.choice import Choice, needs_of, open_subject
from kttools.plan.memory import Machine
from tests.memory import peak_rss_bytes
choice = Choice(None, None, 512, "off", 1)
planned = needs_of(open_subject(Path(sys.argv[1])), choice, Machine(1 << 40, (), 1)).ram_total
line = ["chat", sys.argv[1], "-p", "The quick brown fox " * 60, "-n", "200", "--raw", "-t", "1"]
assert cli.main([*line, "--cache_lens", "512", "--seed", "1", "--quiet"]) == 0
print("", json.dumps([planned, peak_rss_bytes()]), sep=chr(10))
"""


def run(code: str, repo: Path, *arguments: str) -> Any:
    line = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(line, cwd=repo, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def assert_within_5_percent(bundle: Path, repo: Path, lengths: list[int]) -> None:
    for (planned, peak, _), length in zip(
        run(MEASURE, repo, str(bundle), json.dumps(lengths))["rows"], lengths, strict=True
    ):
        assert abs(planned - peak) <= 0.05 * peak, f"{length} tokens: planned {planned}, took {peak}"


@pytest.mark.parametrize("name", ["nano_bundle", "nano_bundle_bf16"])
def test_what_a_process_takes_is_what_was_planned(
    name: str, request: pytest.FixtureRequest, repo: Path
) -> None:
    assert_within_5_percent(request.getfixturevalue(name), repo, [256, 1024, 3000])


@pytest.mark.parametrize("formats", ["int8 int4", "bf16 bf16", "int4 int8"])
def test_so_it_is_with_the_larger_model(
    formats: str, tiny_checkpoint: Path, tmp_path: Path, repo: Path
) -> None:
    cpu, gpu = formats.split()
    bundle = quantize(tiny_checkpoint, tmp_path / "b", "--cpu-format", cpu, "--gpu-format", gpu)
    assert_within_5_percent(bundle, repo, [512, 2048, 4000])


def test_so_it_is_with_chat(nano_bundle: Path, repo: Path) -> None:
    planned, peak = run(CHAT, repo, str(nano_bundle))
    assert abs(planned - peak) <= 0.05 * peak


@pytest.fixture(scope="module")
def wide_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dense weights of 98 MB, so that the allocator's noise is small beside them."""
    values = config(hidden_size=512, vocab_size=40000, intermediate_size=4096, kv_lora_rank=256)
    directory = tmp_path_factory.mktemp("wide")
    source = save_model(directory / "model", values, hub_tensors(values))
    return quantize(source, directory / "bundle", "--gpu-format", "bf16")


def test_dense_weights_are_what_load_takes(wide_bundle: Path, repo: Path) -> None:
    """Beside a few MB of threads and libraries, the weights alone."""
    found = run(MEASURE, repo, str(wide_bundle), "[64]")
    dense = found["rows"][0][2]
    assert dense > 90e6
    assert abs(found["grown"] - dense) <= 0.03 * dense + 6e6, found


def test_replicate_counts_a_copy_per_node(nano_bundle: Path) -> None:
    subject = open_subject(nano_bundle)
    two = Machine(1 << 40, (), 2)
    shard, copied = (
        needs_of(subject, Choice(None, None, 64, numa, 4), two).ram for numa in ("shard", "replicate")
    )
    assert sum(shard.numa.node_bytes) == shard.experts
    assert copied.copies == 2 * copied.experts
    assert copied.total - shard.total == copied.copies
    for ram in (shard, copied):
        assert len(ram.node_bytes()) == 2
        assert sum(ram.node_bytes()) == ram.total
        assert min(ram.node_bytes()) > ram.experts // 2


def test_cache_grows_by_its_tokens(nano_bundle: Path) -> None:
    subject = open_subject(nano_bundle)
    short, long = (needs_of(subject, Choice(None, None, n, "off", 1), HERE).ram.cache for n in (1000, 3000))
    assert (short, long) == (1000 * 4 * (64 + 32) * 2, 3000 * 4 * (64 + 32) * 2)
