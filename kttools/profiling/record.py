"""Text through the model, layer by layer, and what the experts of each layer did on it.

Layers are outermost: all batches of a shard pass one layer before the next. Whether the hidden states between
layers stay in memory or go to disk (kttools.profiling.streamed) changes nothing in what is computed.
"""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .layerwise import LayerRunner, Window, batches
from .observed import DEFAULT_EVERY, Sample, draw
from .profile_file import Arrays
from .recorder import recording
from .statistics import Stats, add, choice_statistics, output_statistics

Progress = Callable[[int], object]


@dataclass(frozen=True, slots=True)
class Batch:
    """Windows on their way through the layers. lengths: tokens of each; hidden float32 [T, hidden_size]."""

    lengths: list[int]
    sample: Sample
    hidden: Tensor


def embed(runner: LayerRunner, group: Sequence[Window]) -> Tensor:
    """Windows one after the other before the first layer: float32 [tokens, hidden_size]."""
    return runner.embed(torch.cat([w.token_ids for w in group]))


def arrange(group: Iterable[Window], hidden: Tensor, gram_every: int) -> list[Batch]:
    """The windows' hidden states in batches: views, so that a batch's layer changes `hidden`."""
    found, start = [], 0
    for chosen in batches(group):
        sizes = lengths(chosen)
        end = start + sum(sizes)
        found.append(Batch(sizes, draw(chosen, gram_every), hidden[start:end]))
        start = end
    return found


def lengths(chosen: Sequence[Window]) -> list[int]:
    """Tokens of each window."""
    return [len(w.token_ids) for w in chosen]


@torch.inference_mode()
def run_layer(runner: LayerRunner, index: int, grouped: Iterable[Batch]) -> Stats:
    """One layer on all batches, in place; what its experts did, nothing for a dense layer."""
    moe, total = runner.moe(index), Stats()
    with contextlib.nullcontext() if moe is None else recording(moe) as recorder:
        for batch in grouped:
            if recorder is None:
                runner.run(index, batch.hidden, lengths=batch.lengths)
                continue
            recorder.rows = batch.sample.rows
            runner.run(index, batch.hidden, lengths=batch.lengths)
            count = runner.config.n_routed_experts
            energy = batch.hidden[batch.sample.rows].square().sum(dim=1)
            add(total, choice_statistics(recorder.take_choices(), batch.lengths, count))
            add(total, output_statistics(recorder.take(), batch.sample, energy, count))
    return total


def stacked(found: Sequence[Stats]) -> Arrays:
    """The statistics of the MoE layers in order, stacked on the first axis."""
    return {name: torch.stack([stats[name] for stats in found]).numpy() for name in found[0]}


def layer_share(index: int, num_layers: int, num_tokens: int) -> int:
    """Tokens to report as done for one layer: a shard's layers add up to its tokens."""
    return (index + 1) * num_tokens // num_layers - index * num_tokens // num_layers


def record(
    runner: LayerRunner,
    group: Sequence[Window],
    on_tokens: Progress = lambda count: None,
    gram_every: int = DEFAULT_EVERY,
) -> Arrays:
    """Statistics of some windows, every MoE layer stacked on the first axis."""
    hidden = embed(runner, group)
    grouped = arrange(group, hidden, gram_every)
    found = []
    for index in range(runner.num_layers):
        stats = run_layer(runner, index, grouped)
        if stats:
            found.append(stats)
        on_tokens(layer_share(index, runner.num_layers, len(hidden)))
    return stacked(found)
