"""Shards: the same bytes however the work is split, cut off, or streamed; nothing foreign is merged."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import kttools_runtime as kt
from kttools.profiling import collect as collecting
from kttools.profiling import streamed as streaming
from kttools.profiling.collect import Collected, Part, Recording, Task, collect, limited, split, tasks
from kttools.profiling.data import Document
from kttools.profiling.layerwise import LayerRunner, Window
from kttools.profiling.probes import merge_probes, sample
from kttools.profiling.profile_file import merge, read_profile, read_shard, write_shard
from kttools.profiling.streamed import collect_streamed, disk_bytes, state_path
from kttools_runtime.errors import CorruptFileError, InvalidInputError, UsageError

PROFILE_FILES = ("profile.expert-profile.json", "profile.safetensors")
WHOLE = Part()
HOW = Recording(window_tokens=64, gram_every=3)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collecting, "SHARD_TOKENS", 40)


def plan(runner: LayerRunner, texts: list[Window], where: Path, part: Part = WHOLE) -> list[Task]:
    found: list[Task] = []
    for domain in "ab":
        own = [w for w in texts if w.domain == domain]
        found += tasks(runner, domain, own, {}, where, how=HOW, model_name="nano")
    return part.of(found)


def shards(where: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(where.glob("**/shards/*"))}


@pytest.fixture(scope="module")
def whole(runner: LayerRunner, texts: list[Window], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything collected in one go."""
    where = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collecting, "SHARD_TOKENS", 40)
        collect(runner, plan(runner, texts, where))
    return where


@pytest.mark.parametrize("count", [1, 2, 3])
def test_split_equals_whole(
    runner: LayerRunner, texts: list[Window], whole: Path, tmp_path: Path, count: int
) -> None:
    for index in range(1, count + 1):
        done = collect(runner, plan(runner, texts, tmp_path / f"part{index}", Part(index, count)))
        assert done.recorded_tokens > 0
    assert shards(tmp_path) == shards(whole)
    assert len(shards(whole)) > 4
    parts = sorted(tmp_path.glob("part*/shards/*"))
    merge((whole / "shards").glob("*"), tmp_path / "a")
    merge(reversed(parts), tmp_path / "b")
    for name in PROFILE_FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    profile = read_profile(tmp_path / "a")
    tokens = sum(len(w.token_ids) for w in texts)
    assert profile.pooled()["tokens"].tolist() == [tokens] * len(runner.config.moe_layers)
    assert (profile.pooled()["count"].sum(axis=1) == 8 * tokens).all()
    assert profile.header["recording"] == {"window_tokens": 64, "gram_every": 3}


def test_threads_change_no_bit(
    nano_bundle: Path, runner: LayerRunner, texts: list[Window], whole: Path, tmp_path: Path
) -> None:
    two = LayerRunner(kt.load(nano_bundle, threads=2, expert_table="none"))
    collect(two, plan(two, texts, tmp_path))
    assert shards(tmp_path) == shards(whole)


def test_nothing_foreign_is_merged(whole: Path, tmp_path: Path) -> None:
    paths = sorted((whole / "shards").glob("*"))
    with pytest.raises(InvalidInputError, match=r"shard a-00000 is already there as .*a-00000"):
        merge([*paths, paths[0]], tmp_path)
    shard = read_shard(paths[0])
    for key, value in {"fingerprint": "0" * 64, "gram_every": 8, "window_tokens": 9}.items():
        header = shard.header | {key: value, "id": "b-99999"}
        write_shard(tmp_path / "odd.safetensors", dataclasses.replace(shard, header=header))
        with pytest.raises(InvalidInputError, match=rf"odd.safetensors: {key} differs from .*do not mix"):
            merge([*paths, tmp_path / "odd.safetensors"], tmp_path)
    with pytest.raises(InvalidInputError, match="no shards to merge"):
        merge([], tmp_path)


def test_a_second_run_keeps_shards_and_refuses_other_text(
    runner: LayerRunner, texts: list[Window], whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole / "shards", tmp_path / "shards")
    before = shards(tmp_path)
    told: list[int] = []
    again = collect(runner, plan(runner, texts, tmp_path), told.append)
    tokens = sum(len(w.token_ids) for w in texts)
    assert again == Collected(0, tokens, 0.0)
    assert sum(told) == tokens
    assert shards(tmp_path) == before
    with pytest.raises(InvalidInputError, match="another text_sha256; choose a new -o"):
        collect(runner, plan(runner, texts[1:], tmp_path))
    other = [
        dataclasses.replace(t, header=t.header | {"gram_every": 1}) for t in plan(runner, texts, tmp_path)
    ]
    with pytest.raises(InvalidInputError, match="another gram_every"):
        collect(runner, other)


def test_nan_and_cut_shards_are_refused(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    shard = read_shard(whole / "shards" / "a-00000.safetensors")
    broken = shard.stats | {"sum_w": np.full_like(shard.stats["sum_w"], np.nan)}
    write_shard(path, dataclasses.replace(shard, stats=broken))
    with pytest.raises(CorruptFileError, match="sum_w holds values that are not finite"):
        read_shard(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CorruptFileError, match="not a readable safetensors file"):
        merge([path], tmp_path / "out")


def test_a_part_must_be_one_of_them() -> None:
    for index, count in ((0, 1), (3, 2)):
        with pytest.raises(UsageError, match=f"--shard {index}/{count}"):
            Part(index, count)


class Killed(BaseException):
    pass


def test_a_streamed_run_equals_the_one_in_memory(
    nano_bundle: Path, texts: list[Window], whole: Path, tmp_path: Path
) -> None:
    lazy = LayerRunner(kt.load(nano_bundle, threads=1, expert_table="none", stream_layers=True))
    told: list[int] = []
    done = collect_streamed(lazy, plan(lazy, texts, tmp_path), told.append)
    assert shards(tmp_path) == shards(whole)
    assert not list((tmp_path / streaming.WORK_DIR).iterdir())
    assert done.recorded_tokens == sum(told) == sum(len(w.token_ids) for w in texts)
    assert collect_streamed(lazy, plan(lazy, texts, tmp_path)).recorded_tokens == 0


@pytest.mark.parametrize("calls", [1, 7, 20])
def test_a_streamed_run_goes_on_at_shard_and_layer(
    runner: LayerRunner,
    texts: list[Window],
    whole: Path,
    tmp_path: Path,
    calls: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Cut off after some (shard, layer) steps, the second run makes exactly the rest."""
    real, counted = streaming.run_layer, [0]

    def counting(*arguments: object) -> object:
        if counted[0] == calls:
            raise Killed
        counted[0] += 1
        return real(*arguments)  # type: ignore[arg-type]

    chosen = plan(runner, texts, tmp_path)
    steps = len(chosen) * runner.num_layers
    monkeypatch.setattr(streaming, "run_layer", counting)
    with pytest.raises(Killed):
        collect_streamed(runner, chosen)
    calls, counted[0] = steps - calls, 0
    collect_streamed(runner, chosen)
    assert counted[0] == calls
    assert shards(tmp_path) == shards(whole)


def test_a_foreign_or_broken_state_is_made_again(
    runner: LayerRunner, texts: list[Window], whole: Path, tmp_path: Path
) -> None:
    first, second, *_ = chosen = plan(runner, texts, tmp_path)
    streaming._advance(runner, first, 0)
    state_path(second).write_bytes(state_path(first).read_bytes())
    state_path(first).write_bytes(state_path(first).read_bytes()[:100])
    collect_streamed(runner, chosen)
    assert shards(tmp_path) == shards(whole)


def test_the_states_fit_the_disk_they_ask_for(
    runner: LayerRunner, texts: list[Window], tmp_path: Path
) -> None:
    first, *_ = plan(runner, texts, tmp_path)
    streaming._advance(runner, first, 0)
    hidden = safetensors.torch.load_file(state_path(first))["hidden"]
    assert disk_bytes([first], runner.config.hidden_size) == 2 * hidden.numel() * 4


KILLED_RUN = """
import sys
from pathlib import Path
from kttools.profiling import collect
from kttools.cli import main
collect.SHARD_TOKENS = 1000
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("stream", ["--no-stream-layers", "--stream-layers"])
def test_kill_9_loses_at_most_one_shard(
    nano_bundle: Path, samples_dir: Path, tmp_path: Path, stream: str
) -> None:
    def start(where: Path, *options: str) -> subprocess.Popen[bytes]:
        data = f"--data=chat=jsonl:{samples_dir}/text/chat.jsonl#text"
        fixed = [data, "--tokens=12000", "--window=128", "-t1", "--quiet", "-o", str(where), *options]
        command = [sys.executable, "-c", KILLED_RUN, "profile-experts", "collect", str(nano_bundle), *fixed]
        return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})

    assert start(tmp_path / "whole").wait() == 0
    cut = tmp_path / "cut"
    folder = cut / ("shards" if stream.startswith("--no") else streaming.WORK_DIR)
    process = start(cut, stream)
    while process.poll() is None and len(list(folder.glob("[!.]*"))) < 3:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    # What was being written has a name of its own, in front of the final one.
    left = {path: path.read_bytes() for path in (cut / "shards").glob("[!.]*")}
    for path, content in left.items():
        assert content == (tmp_path / "whole" / "shards" / path.name).read_bytes()
    assert (3 if "no" in stream else 0) <= len(left) < len(shards(tmp_path / "whole"))
    assert start(cut, stream).wait() == 0
    assert {n: b for n, b in shards(cut).items() if n[0] != "."} == shards(tmp_path / "whole")


def test_shards_never_cut_a_document() -> None:
    chosen = [Window("a", f"d{i // 3}", torch.arange(10)) for i in range(12)]
    groups = list(split(chosen, 25))
    assert [sorted({w.document for w in group}) for group in groups] == [["d0"], ["d1"], ["d2"], ["d3"]]


def test_probe_sample_does_not_depend_on_the_split(texts: list[Window]) -> None:
    whole = sample(texts)
    halves = merge_probes([sample(texts[6:]), sample(texts[:6])])
    assert all(np.array_equal(whole[name], halves[name]) for name in whole)


def test_limits() -> None:
    documents = [Document("a", str(i), list(range(100))) for i in range(9)]
    found = list(limited(documents, 40, 100))
    assert [len(w.token_ids) for w in found] == [40, 40, 40]
