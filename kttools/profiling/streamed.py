"""Collecting from a model larger than RAM: every shard passes one layer before the next layer is loaded.

Between layers a shard's hidden states lie on disk, beside the statistics of its layers so far: a run that was
cut off goes on at the layer where each shard stopped. The computation is that of kttools.profiling.record, so
the shards are the same, bit for bit.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kttools.bundle.atomic import atomic_write_bytes
from kttools_runtime import strict_json
from kttools_runtime.errors import CorruptFileError

from .collect import Collected, Task
from .layerwise import LayerRunner
from .record import Progress, arrange, embed, layer_share, run_layer, stacked
from .statistics import Stats

WORK_DIR = "streaming"
HIDDEN = "hidden"


@dataclass(frozen=True, slots=True)
class State:
    """A shard on its way. next_layer: the first one it has not passed; stats by model layer."""

    next_layer: int
    hidden: Tensor
    stats: dict[int, Stats]


def state_path(task: Task) -> Path:
    """Where a shard lies while it is made: beside shards/."""
    return task.path.parent.parent / WORK_DIR / f"{task.header['id']}.safetensors"


def disk_bytes(chosen: Sequence[Task], hidden_size: int) -> int:
    """What the hidden states of these shards need at the most: each once, and the one being replaced."""
    sizes = [4 * hidden_size * task.tokens for task in chosen]
    return sum(sizes) + max(sizes, default=0)


@torch.inference_mode()
def collect_streamed(
    runner: LayerRunner, chosen: Sequence[Task], on_tokens: Progress = lambda count: None
) -> Collected:
    """As collect(), layer by layer over all shards. Raises as collect()."""
    pending = [task for task in chosen if not task.is_done]
    kept = sum(task.tokens for task in chosen) - sum(task.tokens for task in pending)
    on_tokens(kept)
    started = time.perf_counter()
    next_layers = [_next_layer(task) for task in pending]
    for index in range(runner.num_layers):
        for task, next_layer in zip(pending, next_layers, strict=True):
            if next_layer <= index:
                _advance(runner, task, index)
            on_tokens(layer_share(index, runner.num_layers, task.tokens))
    for task in pending:
        _finish(task)
    return Collected(sum(task.tokens for task in pending), kept, time.perf_counter() - started)


def _advance(runner: LayerRunner, task: Task, index: int) -> None:
    """One shard through one layer, from disk to disk."""
    state = _read(task) if index > 0 else State(0, embed(runner, task.group), {})
    found = run_layer(runner, index, arrange(task.group, state.hidden, task.gram_every))
    stats = state.stats | ({index: found} if found else {})
    _write(task, State(index + 1, state.hidden, stats))


def _finish(task: Task) -> None:
    state = _read(task)
    task.finish(stacked([state.stats[index] for index in sorted(state.stats)]))
    state_path(task).unlink()


def _next_layer(task: Task) -> int:
    """0 too where the state on disk is broken or of other text or another model: it is made again."""
    path = state_path(task)
    if not path.exists():
        return 0
    try:
        with safe_open(str(path), "pt") as file:
            header = strict_json.parse((file.metadata() or {}).get("kttools", "null").encode(), str(path))
    except (SafetensorError, OSError, CorruptFileError):
        return 0
    if not isinstance(header, dict) or header.get("task") != task.header:
        return 0
    return int(header["next_layer"])


def _read(task: Task) -> State:
    path = state_path(task)
    try:
        tensors = safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise CorruptFileError(f"{path}: not readable: {error}; remove it and run again") from None
    stats: dict[int, Stats] = {}
    for name, value in tensors.items():
        if name != HIDDEN:
            index, _, short = name.partition(".")
            stats.setdefault(int(index), {})[short] = value
    return State(_next_layer(task), tensors[HIDDEN], stats)


def _write(task: Task, state: State) -> None:
    path = state_path(task)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"{index}.{name}": v for index, stats in state.stats.items() for name, v in stats.items()}
    tensors = {name: value.contiguous() for name, value in tensors.items()} | {HIDDEN: state.hidden}
    header = strict_json.canonical({"task": task.header, "next_layer": state.next_layer}).decode("ascii")
    # Not save_file: it would put a file of its own in the place of the one that is locked.
    atomic_write_bytes(path, safetensors.torch.save(tensors, {"kttools": header}))
