"""What a layer's error does to the output: forks with one layer reduced, carried to the end."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from kttools.bundle.atomic import atomic_write_bytes
from kttools_runtime import strict_json
from kttools_runtime.expert_policy import LayerPolicy

from .layerwise import LayerRunner, Policies, Window
from .measure import compare_tokens
from .measured_file import policies_digest, windows_digest


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """One layer. d: mean KL of the fork; noise: of the null fork; s = (d - noise) / epsilon."""

    d: float
    standard_error: float
    noise: float
    epsilon: float

    @property
    def s(self) -> float:
        return max(self.d - self.noise, 1e-12) / max(self.epsilon, 1e-30)


def fork_kl(
    runner: LayerRunner, chosen: Sequence[Window], forks: dict[int, list[LayerPolicy | None]]
) -> dict[int, Tensor]:
    """Mean KL of the full model against each fork, by window: {layer: float64 [forks, windows]}.

    A fork runs its layer under one policy and everything after it natively, from the same hidden state.
    """
    result = {layer: torch.zeros(len(p), len(chosen), dtype=torch.float64) for layer, p in forks.items()}
    for column, window in enumerate(chosen):
        for (layer, row), kl in _window_kl(runner, window, forks).items():
            result[layer][row, column] = kl
    return result


def _window_kl(
    runner: LayerRunner, window: Window, forks: dict[int, list[LayerPolicy | None]]
) -> dict[tuple[int, int], float]:
    """Layer by layer: a fork is split off before its layer, all of them go on together."""
    base = runner.embed(window.token_ids)
    live: dict[tuple[int, int], Tensor] = {}
    for index in range(runner.num_layers):
        for hidden in live.values():
            runner.run(index, hidden)
        for row, policy in enumerate(forks.get(index, [])):
            live[index, row] = base.clone()
            runner.run(index, live[index, row], policy)
        runner.run(index, base)
    return {
        key: float(compare_tokens(runner, base, hidden, window.token_ids).kl.mean(dtype=torch.float64))
        for key, hidden in live.items()
    }


def sensitivities(
    runner: LayerRunner, chosen: Sequence[Window], reduced: Policies, epsilon: dict[int, float]
) -> dict[int, Sensitivity]:
    """By MoE layer. reduced: the policy of each layer's fork; epsilon: its squared error per token.

    The noise floor is a fork of the first layer that keeps everything, summed in another order: its rounding
    goes through the most layers.
    """
    native = runner.config.num_experts_per_tok
    null = LayerPolicy(kind="uniform", k=native, order="weight")
    first = min(reduced)
    forks: dict[int, list[LayerPolicy | None]] = {i: [policy] for i, policy in reduced.items()}
    forks[first].append(null)
    found = fork_kl(runner, chosen, forks)
    weights = torch.tensor([len(w.token_ids) - 1.0 for w in chosen], dtype=torch.float64)
    share = weights / weights.sum()
    noise = float(found[first][1] @ share)
    result = {}
    for layer, kl in found.items():
        mean = kl[0] @ share
        error = ((kl[0] - mean).square() * share.square()).sum().sqrt()
        result[layer] = Sensitivity(float(mean), float(error), noise, epsilon[layer])
    return result


def kept_sensitivities(
    store: Path | None,
    fingerprint: str,
    chosen: Sequence[Window],
    reduced: Policies,
    make: Callable[[], dict[int, Sensitivity]],
) -> dict[int, Sensitivity]:
    """make(), or what an earlier run kept in the directory `store` for the same model, windows, policies."""
    if store is None:
        return make()
    given = f"{fingerprint}\n{windows_digest(chosen)}\n{policies_digest(reduced)}"
    path = store / f"sensitivity-{hashlib.sha256(given.encode()).hexdigest()[:32]}.json"
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return {int(layer): Sensitivity(**row) for layer, row in rows.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        pass  # not there, or not readable: made again
    made = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {str(layer): asdict(sensitivity) for layer, sensitivity in made.items()}
    atomic_write_bytes(path, strict_json.canonical(rows))
    return made
