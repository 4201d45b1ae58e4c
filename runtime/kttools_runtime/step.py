"""On the CPU: tokens through a layer in two calls of C++, not some forty operations of torch.

The same arithmetic as the modules it is made of, in float32 between matrices; what has no native form
(another kind of attention, a bias, experts that stand in for the engine's) runs as the module it is.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _kernels
from .attention import LatentAttention, Step
from .expert_policy import LayerPolicy
from .experts import ExpertLayer
from .gqa import GroupedQueryAttention
from .linear import Linear, LinearGroup, PackedCpuLinear
from .mlp import GatedMLP
from .moe import MoELayer, RoutedExperts
from .norm import RMSNorm
from .routing import LayerTable, Router

if TYPE_CHECKING:
    from .model import DecoderLayer

MAX_STEP_TOKENS: int = _kernels.MAX_STEP_ROWS


class NativeHalves:
    """The two halves of a decoder layer as the kernels run them."""

    __slots__ = ("_attention", "_mlp")

    def __init__(self, engine: Any, layer: "DecoderLayer") -> None:
        self._attention = _attention_step(engine, layer)
        self._mlp = _MlpStep(engine, layer)

    def attends(self, num_tokens: int) -> bool:
        """Whether the kernels have this attention, for so many tokens at once."""
        native = self._attention
        return native is not None and (num_tokens <= MAX_STEP_TOKENS or native.takes_many)

    def attend(self, hidden: Tensor, step: Step, cache: Tensor) -> bool:
        """hidden [T, hidden_size] float32 and rows of the layer's cache, updated in place.

        False and nothing done where the kernels have no such attention.
        """
        if not self.attends(step.num_tokens):
            return False
        self._attention.forward(hidden.numpy(), step.pairs, cache.view(torch.uint16).numpy(), step.start)
        return True

    def mix(self, hidden: Tensor) -> bool:
        """The same for the mixture or dense half."""
        return self._mlp.forward(hidden)


class _MlpStep:
    """The second half of a layer, as long as its experts are the ones it was made with."""

    __slots__ = ("_experts", "_moe", "_native", "_rule", "_table")

    def __init__(self, engine: Any, layer: "DecoderLayer") -> None:
        mlp = layer.mlp
        self._moe = mlp if isinstance(mlp, MoELayer) else None
        self._experts: RoutedExperts | None = mlp.experts if isinstance(mlp, MoELayer) else None
        self._table: LayerTable | None = None
        self._rule: Any = None
        if isinstance(mlp, MoELayer):
            self._native = _moe_step(engine, layer.mlp_norm, mlp)
        else:
            self._native = _dense_step(engine, layer.mlp_norm, mlp)

    def forward(self, hidden: Tensor) -> bool:
        """Whether the step could. A table that only Python knows acts between the step's two parts."""
        moe, native = self._moe, self._native
        if native is None or (moe is not None and moe.experts is not self._experts):
            return False
        if moe is None:
            native.forward(hidden.numpy())
            return True
        rule, table = self._rule_of(moe.router), moe.router.table
        if moe.watch is None and (table is None or rule is not None):
            native.forward(hidden.numpy(), rule)
            return True
        x, ids, weights = self._route(moe.router, hidden, rule)
        if moe.watch is not None:
            moe.watch(x, ids, weights)
        native.forward_routed(
            hidden.numpy(), x.numpy(), ids.contiguous().numpy(), weights.contiguous().numpy()
        )
        return True

    def _rule_of(self, router: Router) -> Any:
        """The native form of the router's table; None where it has none, or there is no table."""
        table = router.table
        if table is not self._table:
            rule = None
            if isinstance(table, LayerPolicy) and type(table) is LayerPolicy:  # others select as they like
                rule = table.native(router.config.n_routed_experts, router.num_experts)
            self._table, self._rule = table, rule
        return self._rule

    def _route(self, router: Router, hidden: Tensor, rule: Any) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, hidden_size] and what is computed of the choice, ids and weights [T, k]."""
        num_tokens = hidden.shape[0]
        k = router.num_experts if rule is None else rule.width
        ids, weights = torch.empty(num_tokens, k, dtype=torch.int64), torch.empty(num_tokens, k)
        x = torch.empty_like(hidden)
        if rule is not None or router.table is None:
            self._native.route(hidden.numpy(), x.numpy(), ids.numpy(), weights.numpy(), rule=rule)
            return x, ids, weights
        scores = torch.empty(num_tokens, k)
        self._native.route(hidden.numpy(), x.numpy(), ids.numpy(), weights.numpy(), scores.numpy())
        return x, *router.table.select(ids, weights, scores)


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
    if isinstance(layer.attention, LatentAttention):
        return _latent_step(engine, layer.attention_norm, layer.attention)
    return _grouped_step(engine, layer.attention_norm, layer.attention)


def _latent_step(engine: Any, norm: RMSNorm, attention: LatentAttention) -> Any:
    if attention.w_uk.dtype != torch.bfloat16:
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
        _norm(norm),
        matrices[:count],
        _norm(attention.q_norm) if has_q_b else None,
        matrices[count + 1] if has_q_b else None,
        _norm(attention.kv_norm),
        attention.w_uk.view(torch.uint16).numpy(),
        attention.w_uv.view(torch.uint16).numpy(),
        matrices[count],
    )


def _grouped_step(engine: Any, norm: RMSNorm, attention: GroupedQueryAttention) -> Any:
    """None where an input or the output is no matrix of the kernels."""
    config, linears = attention.config, [*attention.inputs.linears, attention.o_proj]
    packed = [linear for linear in linears if isinstance(linear, PackedCpuLinear)]
    if len(packed) < len(linears):
        return None
    *inputs, out = packed
    sinks = attention.sinks
    return _kernels.GqaStep(
        engine,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        dim=config.qk_head_dim,
        rope=config.qk_rope_head_dim,
        window=attention.window,
        softmax_scale=config.softmax_scale,
        norm=_norm(norm),
        inputs=[linear.packed for linear in inputs],
        out=out.packed,
        input_bias=_biases(inputs),
        q_norm=None if attention.q_norm is None else _norm(attention.q_norm),
        k_norm=None if attention.k_norm is None else _norm(attention.k_norm),
        sinks=None if sinks is None else sinks.flatten().numpy(),
        out_bias=_biases([out]),
    )


def _biases(linears: Sequence[PackedCpuLinear]) -> Any:
    """Their biases side by side; None when none has one."""
    if all(linear.bias is None for linear in linears):
        return None
    parts = [torch.zeros(x.out_features) if x.bias is None else x.bias for x in linears]
    return torch.cat(parts).numpy()
