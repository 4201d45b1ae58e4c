"""What a GGUF architecture says: its tensor names and its keys, as tables that read and write.

A new architecture is one file with one Architecture and one entry in ARCHITECTURES.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from kttools.checkpoint.gguf.header import GgufTensor
from kttools.checkpoint.gguf.metadata import Metadata
from kttools_runtime.config import ModelConfig
from kttools_runtime.errors import UnsupportedModelError

REQUIRED: Any = ...
LAYER = re.compile(r"(?<=\.)(\d{1,9})(?=\.)")


class Transform(Enum):
    """How a tensor's numbers differ between GGUF and the hub."""

    NONE = "as it is"
    # Rotary pairs (0, d/2), (1, d/2 + 1) ... of each head, laid out as neighbours for llama.cpp.
    QUERY_HALVES = "rows of each query head, two halves interleaved"
    KEY_HALVES = "rows of each key head, two halves interleaved"
    ONE_ROW = "a vector that the hub has as a matrix of one row"


@dataclass(frozen=True, slots=True)
class Name:
    """One tensor's name in both worlds, with `{layer}` where it has one, and `{expert}` in old files.

    canonical: its name in a bundle, where the hub's is another.
    """

    gguf: str
    hub: str
    transform: Transform = Transform.NONE
    canonical: str = ""


@dataclass(frozen=True, slots=True)
class Key:
    """One key of config.json and its GGUF key, relative to the architecture's name.

    kind: int, float or bool. default: for a file that lacks it; REQUIRED refuses such a file.
    """

    config: str
    gguf: str
    kind: type = int
    default: Any = REQUIRED


@dataclass(frozen=True, slots=True)
class Architecture:
    """One value of general.architecture.

    finish(metadata, tensors, config): completes what the keys gave (in place) and returns notices.
    describe(model): the GGUF keys beyond the table, relative, for a file we write; raises
    UnsupportedModelError for what GGUF cannot say. gaps(model): what keeps such a model from being written as
    this, in words; empty when nothing does.
    """

    name: str
    keys: tuple[Key, ...]
    names: tuple[Name, ...]
    finish: Callable[[Metadata, dict[str, GgufTensor], dict[str, Any]], list[str]]
    describe: Callable[[ModelConfig], dict[str, int | float | bool | str]]
    gaps: Callable[[ModelConfig], list[str]]

    def hub_name(self, gguf_name: str) -> tuple[str, Transform] | None:
        """The hub's name of a GGUF tensor; None when the table does not know it."""
        pattern, layer = _split(gguf_name)
        one, expert = _split(pattern, "{expert}")
        for name in self.names:
            if name.gguf in (pattern, one):
                return name.hub.format(layer=layer, expert=expert), name.transform
        return None

    def gguf_name(self, canonical_name: str) -> tuple[str, Transform] | None:
        """The GGUF name of a bundle's tensor; None when the table does not know it."""
        pattern, layer = _split(canonical_name)
        for name in self.names:
            if (name.canonical or name.hub) == pattern:
                return name.gguf.format(layer=layer), name.transform
        return None

    def config(self, metadata: Metadata, tensors: dict[str, GgufTensor]) -> tuple[dict[str, Any], list[str]]:
        """config.json's words for the file's metadata, and notices. Raises InvalidInputError."""
        config = read_keys(metadata, self.name, self.keys)
        notices = self.finish(metadata, tensors, config)
        return config, notices


def read_keys(metadata: Metadata, prefix: str, keys: Iterable[Key]) -> dict[str, Any]:
    """The table's keys from the metadata, by their config.json names."""
    getters = {int: metadata.integer, float: metadata.number, bool: metadata.boolean}
    return {key.config: getters[key.kind](f"{prefix}.{key.gguf}", key.default) for key in keys}


def model_keys(model: ModelConfig, keys: Iterable[Key]) -> dict[str, int | float | bool | str]:
    """The table's keys for a file we write, from the fields of the same name; null ones are left out."""
    values = {key.gguf: getattr(model, key.config, None) for key in keys}
    return {name: value for name, value in values.items() if value is not None}


def unmet(needs: dict[str, bool]) -> list[str]:
    """The needs that are not met."""
    return [need for need, is_met in needs.items() if not is_met]


def leading_dense_layers(model: ModelConfig) -> int:
    """How many layers stand before the MoE ones, which GGUF takes to be all others."""
    first = model.moe_layers[0] if model.moe_layers else model.num_hidden_layers
    if model.moe_layers != tuple(range(first, model.num_hidden_layers)):
        raise UnsupportedModelError("GGUF cannot say that dense layers follow MoE layers")
    return first


def layer_names(*pairs: tuple[str, str]) -> tuple[Name, ...]:
    """Names below blk.N. and model.layers.N. from their endings."""
    return tuple(Name("blk.{layer}." + gguf, "model.layers.{layer}." + hub) for gguf, hub in pairs)


def _split(name: str, placeholder: str = "{layer}") -> tuple[str, str]:
    """(pattern, number): the first number between dots becomes the placeholder."""
    match = LAYER.search(name)
    if match is None:
        return name, ""
    return f"{name[: match.start()]}{placeholder}{name[match.end() :]}", str(int(match[0]))


# Names that nearly all architectures share.
MODEL_NAMES = (
    Name("token_embd.weight", "model.embed_tokens.weight"),
    Name("output_norm.weight", "model.norm.weight"),
    Name("output.weight", "lm_head.weight"),
)
BLOCK_NAMES = layer_names(
    ("attn_norm.weight", "input_layernorm.weight"),
    ("ffn_norm.weight", "post_attention_layernorm.weight"),
    ("attn_output.weight", "self_attn.o_proj.weight"),
    ("attn_output.bias", "self_attn.o_proj.bias"),
)
DENSE_NAMES = layer_names(
    ("ffn_gate.weight", "mlp.gate_proj.weight"),
    ("ffn_up.weight", "mlp.up_proj.weight"),
    ("ffn_down.weight", "mlp.down_proj.weight"),
)
ROUTED_NAMES = layer_names(
    ("ffn_gate_inp.weight", "mlp.gate.weight"),
    ("ffn_gate_exps.weight", "mlp.experts.gate_proj"),
    ("ffn_up_exps.weight", "mlp.experts.up_proj"),
    ("ffn_down_exps.weight", "mlp.experts.down_proj"),
)
SHARED_NAMES = layer_names(
    ("exp_probs_b.bias", "mlp.gate.e_score_correction_bias"),
    ("ffn_gate_shexp.weight", "mlp.shared_experts.gate_proj.weight"),
    ("ffn_up_shexp.weight", "mlp.shared_experts.up_proj.weight"),
    ("ffn_down_shexp.weight", "mlp.shared_experts.down_proj.weight"),
)
# Multi-token prediction: named, so that the family can leave it out by name.
PREDICTION_NAMES = layer_names(
    ("nextn.eh_proj.weight", "eh_proj.weight"),
    ("nextn.enorm.weight", "enorm.weight"),
    ("nextn.hnorm.weight", "hnorm.weight"),
    ("nextn.embed_tokens.weight", "embed_tokens.weight"),
    ("nextn.shared_head_head.weight", "shared_head.head.weight"),
    ("nextn.shared_head_norm.weight", "shared_head.norm.weight"),
)
COMMON_KEYS = (
    Key("num_hidden_layers", "block_count"),
    Key("max_position_embeddings", "context_length"),
    Key("hidden_size", "embedding_length"),
    Key("intermediate_size", "feed_forward_length"),
    Key("num_attention_heads", "attention.head_count"),
    Key("rms_norm_eps", "attention.layer_norm_rms_epsilon", float),
    Key("rope_theta", "rope.freq_base", float, 10000.0),
    Key("num_experts_per_tok", "expert_used_count"),
)
