"""What a family says: which configs are its own, what they mean, and every tensor with its role."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from kttools.checkpoint.base import Weights
from kttools_runtime.config import ModelConfig


class Role(str, Enum):
    """What a tensor is for; decides where it runs and in which formats it may be stored."""

    EMBEDDING = "embedding"
    NORM = "norm"
    ROUTER = "router"
    ROUTER_BIAS = "router_bias"
    ATTENTION = "attention"
    ATTENTION_BIAS = "attention_bias"
    DENSE_MLP = "dense_mlp"
    SHARED_EXPERT = "shared_expert"
    HEAD = "head"
    EXPERT = "expert"
    EXPERT_BIAS = "expert_bias"

    @property
    def is_linear(self) -> bool:
        """A matrix of the shards that may be quantised (experts go to packs; embedding and router stay)."""
        return self in _LINEAR_ROLES


_LINEAR_ROLES = frozenset({Role.ATTENTION, Role.DENSE_MLP, Role.SHARED_EXPERT, Role.HEAD})


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A non-expert tensor the runtime needs: canonical name, role and shape.

    source_names: what checkpoints call it, the hub's name first; empty: the canonical name.
    """

    name: str
    role: Role
    shape: tuple[int, ...]
    source_names: tuple[str, ...] = ()

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class ExpertPart:
    """Where gate_proj, up_proj or down_proj of one expert lies in a layer's tensors.

    name: format string with `{expert}`, or without it for a tensor that stacks all experts along its first
    dimension. shape: of the whole tensor of that name. Gate and up of one name are the two halves of its
    rows.
    """

    name: str
    shape: tuple[int, ...]

    @property
    def is_stacked(self) -> bool:
        return "{expert}" not in self.name


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """One way checkpoints name a layer's experts; names are relative to `experts_prefix(layer)`."""

    title: str
    gate: ExpertPart
    up: ExpertPart
    down: ExpertPart

    @property
    def parts(self) -> tuple[ExpertPart, ExpertPart, ExpertPart]:
        return self.gate, self.up, self.down


@dataclass(frozen=True, slots=True)
class Family:
    """One model family; a new one is one file with one of these and one entry in FAMILIES.

    read_config(config, generation_config, where) -> (ModelConfig, notices); raises UnsupportedModelError.
    device_tensors(config): every non-expert tensor. expert_layouts(config): the known ways to store experts.
    experts_prefix(layer): what stands before the parts' names. left_out(name, config, names): why a tensor
    that the table does not list may be left out, or None when it is unexpected; names: all tensors there are.
    view(checkpoint): safetensors under the names of the tables, where they lie in another way.
    """

    name: str
    title: str
    architectures: tuple[str, ...]
    model_types: tuple[str, ...]
    read_config: Callable[[dict[str, Any], dict[str, Any], str], tuple[ModelConfig, list[str]]]
    device_tensors: Callable[[ModelConfig], list[TensorSpec]]
    expert_layouts: Callable[[ModelConfig], list[ExpertLayout]]
    experts_prefix: Callable[[int], str]
    left_out: Callable[[str, ModelConfig, frozenset[str]], str | None]
    view: Callable[[Weights], Weights] = lambda checkpoint: checkpoint
