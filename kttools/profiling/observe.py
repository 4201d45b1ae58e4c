"""What the experts did on some windows, kept whole: the probes of allocation and tests."""

import torch

from .layerwise import LayerRunner, Window
from .recorder import Observation, recording


@torch.inference_mode()
def observe(runner: LayerRunner, chosen: list[Window]) -> dict[int, Observation]:
    """All observations of some windows, by MoE layer."""
    seen: dict[int, list[Observation]] = {i: [] for i in runner.config.moe_layers}
    for window in chosen:
        hidden = runner.embed(window.token_ids)
        for index in range(runner.num_layers):
            moe = runner.moe(index)
            if moe is None:
                runner.run(index, hidden)
                continue
            with recording(moe) as recorder:
                runner.run(index, hidden)
            seen[index].append(recorder.take())
    fields = Observation.__dataclass_fields__
    return {
        i: Observation(**{name: torch.cat([getattr(o, name) for o in rows]) for name in fields})
        for i, rows in seen.items()
    }
