"""How checkpoints store routed experts, and which tensors may be left out, as most families do it."""

import re

from kttools_runtime.config import ModelConfig

from .base import ExpertLayout, ExpertPart


def experts_prefix(layer: int) -> str:
    return f"model.layers.{layer}.mlp.experts."


def expert_layouts(config: ModelConfig) -> list[ExpertLayout]:
    """The hub's one tensor per expert, and what transformers 5 saves: stacked, gate and up fused or not."""
    names = ("{expert}.gate_proj.weight", "{expert}.up_proj.weight", "{expert}.down_proj.weight")
    return [one_per_expert(config, *names), *stacked(config)]


def one_per_expert(config: ModelConfig, gate: str, up: str, down: str) -> ExpertLayout:
    """Names with `{expert}`, relative to the family's experts_prefix."""
    wide = (config.moe_intermediate_size, config.hidden_size)
    parts = ExpertPart(gate, wide), ExpertPart(up, wide), ExpertPart(down, wide[::-1])
    return ExpertLayout("one tensor per expert", *parts)


def stacked(config: ModelConfig, prefix: str = "") -> list[ExpertLayout]:
    """All experts of a layer in one tensor; prefix: what stands before gate_up_proj and so on."""
    hidden, inner, experts = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
    wide, tall = (inner, hidden), (hidden, inner)
    layouts = []
    for suffix in ("", ".weight"):
        down = ExpertPart(f"{prefix}down_proj{suffix}", (experts, *tall))
        gate_up = ExpertPart(f"{prefix}gate_up_proj{suffix}", (experts, 2 * inner, hidden))
        layouts.append(ExpertLayout("gate and up fused, experts stacked", gate_up, gate_up, down))
        gate, up = (
            ExpertPart(f"{prefix}{name}{suffix}", (experts, *wide)) for name in ("gate_proj", "up_proj")
        )
        layouts.append(ExpertLayout("experts stacked", gate, up, down))
    return layouts


def left_out(name: str, config: ModelConfig, names: frozenset[str]) -> str | None:
    """The reason a tensor beyond the table may be ignored; None when it should not be there.

    Layers at and after num_hidden_layers that hold an eh_proj are multi-token-prediction (MTP) modules.
    """
    if name.endswith("rotary_emb.inv_freq"):
        return "rope frequencies, computed from config.json"
    if name == "lm_head.weight" and config.tie_word_embeddings:
        return "lm_head.weight, tied to the embedding by config.json"
    if not config.n_shared_experts and ".mlp.shared_experts." in name:
        return "shared expert tensors, n_shared_experts is 0"
    layer = re.match(r"model\.layers\.(\d{1,9})\.", name)
    if layer and int(layer[1]) >= config.num_hidden_layers and f"{layer[0]}eh_proj.weight" in names:
        return f"multi-token-prediction layer {int(layer[1])}"
    return None
