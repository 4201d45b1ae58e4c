"""On the CPU: tokens through a layer in two calls of C++, not some forty operations of torch.

The same arithmetic as the modules it is made of, in float32 between matrices; what has no native form
(another kind of attention, a bias, an expert table, experts that are being recorded) runs as the module it
is.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _kernels
from .attention import LatentAttention, Step
from .cache import KVCache
from .experts import ExpertLayer
from .linear import Linear, LinearGroup, PackedCpuLinear
from .mlp import GatedMLP
from .moe import MoELayer, RoutedExperts
from .norm import RMSNorm

if TYPE_CHECKING:
    from .model import DecoderLayer

MAX_STEP_TOKENS: int = _kernels.MAX_STEP_ROWS


class Steps:
    """The native halves of every layer, made once."""

    __slots__ = ("_halves", "_layers")

    def __init__(self, engine: Any, layers: "Sequence[DecoderLayer]") -> None:
        self._layers = layers
        self._halves = [(_attention_step(engine, layer), _MlpStep(engine, layer)) for layer in layers]

    def uses_torch(self, num_tokens: int) -> bool:
        """Whether a layer's attention is torch's for so many tokens at once."""
        is_many = num_tokens > MAX_STEP_TOKENS
        return any(half is None or (is_many and not half.takes_many) for half, _ in self._halves)

    def forward(self, hidden: Tensor, step: Step, cache: KVCache) -> None:
        """hidden [T, hidden_size] float32 is updated in place; so is the cache."""
        array = hidden.numpy()
        rotations = torch.view_as_real(step.rotations).view(step.num_tokens, -1).numpy()
        for index, (attention, mlp) in enumerate(self._halves):
            layer = self._layers[index]
            if attention is None or (step.num_tokens > MAX_STEP_TOKENS and not attention.takes_many):
                hidden += layer.attention(layer.attention_norm(hidden), step, cache.layers[index])
            else:
                attention.forward(array, rotations, cache.array(index), step.start)
            native = mlp.current()
            if native is None:
                hidden += layer.mlp(layer.mlp_norm(hidden))
            else:
                native.forward(array)


class _MlpStep:
    """The second half of a layer, and whether the native one still stands for it."""

    __slots__ = ("_experts", "_moe", "_native")

    def __init__(self, engine: Any, layer: "DecoderLayer") -> None:
        mlp = layer.mlp
        self._moe = mlp if isinstance(mlp, MoELayer) else None
        self._experts: RoutedExperts | None = mlp.experts if isinstance(mlp, MoELayer) else None
        if isinstance(mlp, MoELayer):
            self._native = _moe_step(engine, layer.mlp_norm, mlp)
        else:
            self._native = _dense_step(engine, layer.mlp_norm, mlp)

    def current(self) -> Any:
        """The native step, or None while a table chooses experts or others stand in for them."""
        moe = self._moe
        if moe is not None and (moe.router.table is not None or moe.experts is not self._experts):
            return None
        return self._native


def _norm(norm: RMSNorm) -> tuple[Any, float]:
    return norm.scaled_weight.contiguous().numpy(), norm.sum_eps


def _packed(linears: Sequence[Linear]) -> list[Any] | None:
    """The native matrices, or None when one is of another kind or has a bias."""
    found = []
    for linear in linears:
        if not isinstance(linear, PackedCpuLinear) or linear.bias is not None:
            return None
        found.append(linear.packed)
    return found


def _gated(mlp: GatedMLP) -> tuple[list[Any], Any] | None:
    matrices = _packed([*mlp.gate_up.linears, mlp.down])
    return None if matrices is None else (matrices[:-1], matrices[-1])


def _dense_step(engine: Any, norm: RMSNorm, mlp: GatedMLP) -> Any:
    matrices = _gated(mlp)
    return None if matrices is None else _kernels.DenseStep(engine, _norm(norm), *matrices)


def _moe_step(engine: Any, norm: RMSNorm, moe: MoELayer) -> Any:
    layer = moe.experts.layer
    if not isinstance(layer, ExpertLayer):
        return None
    shared: tuple[list[Any], Any] | None = ([], None)
    gate = None
    if moe.shared is not None:
        shared = _gated(moe.shared.mlp)
        gate = None if moe.shared.gate is None else moe.shared.gate.flatten().numpy()
    if shared is None:
        return None
    return _kernels.MoeStep(engine, _norm(norm), moe.router.native(engine), layer.native, *shared, gate)


def _attention_step(engine: Any, layer: "DecoderLayer") -> Any:
    attention = layer.attention
    if not isinstance(attention, LatentAttention) or attention.w_uk.dtype != torch.bfloat16:
        return None
    inputs: LinearGroup = attention.inputs
    has_q_b = attention.config.q_lora_rank is not None
    matrices = _packed([*inputs.linears, attention.o_proj, *([attention.q_b_proj] if has_q_b else [])])
    if matrices is None:
        return None
    count = len(inputs.linears)
    return _kernels.LatentStep(
        engine,
        attention.config.qk_rope_head_dim,
        attention.config.softmax_scale,
        _norm(layer.attention_norm),
        matrices[:count],
        _norm(attention.q_norm) if has_q_b else None,
        matrices[count + 1] if has_q_b else None,
        _norm(attention.kv_norm),
        attention.w_uk.view(torch.uint16).numpy(),
        attention.w_uv.view(torch.uint16).numpy(),
        matrices[count],
    )
