"""Shards through Ray give what a plain loop gives. Skipped without Ray; its absence has its own test."""

import sys
from pathlib import Path

import numpy as np
import pytest

from kttools.cli import main
from kttools.profiling.data_spec import parse_spec
from kttools.profiling.ray_adapter import run_shards
from kttools_runtime.errors import UsageError


def test_without_ray_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install 'kttools\[ray\]'"):
        list(run_shards(abs, [1]))


def test_shards_are_bit_identical_wherever_they_run() -> None:
    pytest.importorskip("ray", reason="Ray is not installed (extra: ray)")
    tasks = [np.random.default_rng(seed).standard_normal(1000) for seed in range(4)]
    found = dict(run_shards(np.sort, tasks))
    assert sorted(found) == [0, 1, 2, 3]
    for index, task in enumerate(tasks):
        assert found[index].tobytes() == np.sort(task).tobytes()


def test_a_worker_needs_a_cpu() -> None:
    pytest.importorskip("ray", reason="Ray is not installed (extra: ray)")
    with pytest.raises(UsageError, match="cpus_per_shard must be positive"):
        list(run_shards(abs, [1], cpus_per_shard=0))


def test_a_shards_own_error_comes_back_as_it_is() -> None:
    pytest.importorskip("ray", reason="Ray is not installed (extra: ray)")
    with pytest.raises(UsageError, match="names no file"):
        list(run_shards(parse_spec, ["x=jsonl:"]))


def test_collecting_on_ray_gives_the_same_shards(
    nano_bundle: Path, samples_dir: Path, tmp_path: Path
) -> None:
    pytest.importorskip("ray", reason="Ray is not installed (extra: ray)")
    data = [f"--data={d}=jsonl:{samples_dir}/text/{d}.jsonl#text" for d in ("python", "prose")]
    fixed = ["profile-experts", "collect", str(nano_bundle), *data, "--tokens=1000", "-t1", "--quiet", "-o"]
    assert main([*fixed, str(tmp_path / "here")]) == 0
    assert main([*fixed, str(tmp_path / "there"), "--ray=local", "--workers=2"]) == 0
    here, there = (
        {path.name: path.read_bytes() for path in (tmp_path / where / "shards").iterdir()}
        for where in ("here", "there")
    )
    assert len(here) == 2
    assert here == there
