"""The canonical model configuration: kinds and sizes, no model names.

`kttools.families` translates a checkpoint's config.json into this once; bundle.json carries it as `model`;
the runtime reads nothing else. Words are those of config.json. Every value is checked at construction, so
that a ModelConfig that exists is consistent.

Kinds. attention "mla": multi-head latent attention. "gqa": grouped-query attention; the first
qk_rope_head_dim dimensions of a head are rotated, the other qk_nope_head_dim are not, v_head_dim is their
sum, and the sizes of the latent (q_lora_rank, kv_lora_rank) are null and 0; attention_sinks: a learned logit
per head that takes part in the softmax and has no value. An expert's gate is silu(gate) * up, or with
swiglu_limit g * sigmoid(swiglu_alpha * g) * (u + 1), g = min(gate, limit), u = up within +-limit. router
"sigmoid_bias_groups": DeepSeek-V3's; "softmax_groups": softmax over all experts, then the best (of the
topk_group groups whose best expert is best).
"""

from dataclasses import dataclass
from typing import Any

from . import config_checks as check
from .config_checks import MAX_DIMENSION, MAX_EXPERTS, MAX_LAYERS, checked, defaulted, refuse
from .rope_scaling import KINDS as ROPE_KINDS
from .rope_scaling import RopeScaling, YarnScaling, scaling_from_dict, scaling_to_dict

__all__ = ["ATTENTION_KINDS", "ROUTER_KINDS", "ModelConfig", "YarnScaling"]

ATTENTION_KINDS = ("mla", "gqa")
ROUTER_KINDS = ("sigmoid_bias_groups", "softmax_groups")


def _scaling(value: Any) -> str | None:
    return None if value is None or isinstance(value, tuple(ROPE_KINDS.values())) else "null or an object"


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One model, as the runtime needs it, from from_dict or keywords; raises InvalidInputError."""

    vocab_size: int = checked(check.DIMENSION)
    hidden_size: int = checked(check.DIMENSION)
    intermediate_size: int = checked(check.DIMENSION)
    moe_intermediate_size: int = checked(check.DIMENSION)
    num_hidden_layers: int = checked(check.integer(1, MAX_LAYERS))
    moe_layers: tuple[int, ...] = checked(check.ascending)
    hidden_act: str = checked(check.one_of("silu"))
    rms_norm_eps: float = checked(check.POSITIVE)
    tie_word_embeddings: bool = checked(check.boolean)
    max_position_embeddings: int = checked(check.DIMENSION)
    bos_token_id: int | None = checked(check.optional(check.integer(0, MAX_DIMENSION)))
    eos_token_ids: tuple[int, ...] = checked(check.token_ids)

    attention: str = checked(check.one_of(*ATTENTION_KINDS))
    num_attention_heads: int = checked(check.DIMENSION)
    num_key_value_heads: int = checked(check.DIMENSION)
    q_lora_rank: int | None = checked(check.optional(check.DIMENSION))
    kv_lora_rank: int = checked(check.DIMENSION_OR_0)
    qk_nope_head_dim: int = checked(check.DIMENSION_OR_0)
    qk_rope_head_dim: int = checked(check.DIMENSION)
    v_head_dim: int = checked(check.DIMENSION)
    attention_bias: bool = checked(check.boolean)  # mla: q_a, kv_a and o; gqa: q, k and v
    rope_theta: float = checked(check.number(1.0, exclusive=True))
    rope_interleave: bool = checked(check.boolean)
    rope_scaling: RopeScaling | None = checked(_scaling)  # noqa: RUF009

    router: str = checked(check.one_of(*ROUTER_KINDS))
    n_routed_experts: int = checked(check.integer(1, MAX_EXPERTS))
    n_shared_experts: int = checked(check.integer(0, MAX_EXPERTS))
    num_experts_per_tok: int = checked(check.integer(1, MAX_EXPERTS))
    n_group: int = checked(check.integer(1, MAX_EXPERTS))
    topk_group: int = checked(check.integer(1, MAX_EXPERTS))
    norm_topk_prob: bool = checked(check.boolean)
    routed_scaling_factor: float = checked(check.FINITE)

    # Keys with a default: what a dict leaves out.
    latent_norm_eps: float | None = defaulted(None, check.optional(check.POSITIVE))
    attention_output_bias: bool = defaulted(False, check.boolean)
    qk_norm: bool = defaulted(False, check.boolean)
    sliding_window: int | None = defaulted(None, check.optional(check.DIMENSION))
    sliding_window_layers: tuple[int, ...] = defaulted((), check.ascending)
    shared_expert_intermediate_size: int | None = defaulted(None, check.optional(check.DIMENSION))
    shared_expert_gate: bool = defaulted(False, check.boolean)
    attention_sinks: bool = defaulted(False, check.boolean)
    router_bias: bool = defaulted(False, check.boolean)
    expert_bias: bool = defaulted(False, check.boolean)
    swiglu_alpha: float | None = defaulted(None, check.optional(check.POSITIVE))
    swiglu_limit: float | None = defaulted(None, check.optional(check.POSITIVE))

    def __post_init__(self) -> None:
        check.check_fields(self, "")
        self._check_layers_and_tokens()
        if self.attention == "mla":
            self._check_mla()
        else:
            self._check_gqa()
        if self.qk_rope_head_dim % 2:
            refuse("qk_rope_head_dim", "an even number", self.qk_rope_head_dim)
        self._check_router()
        self._check_shared_expert()
        self._check_expert_gate()

    def _check_layers_and_tokens(self) -> None:
        for key, layers in (
            ("moe_layers", self.moe_layers),
            ("sliding_window_layers", self.sliding_window_layers),
        ):
            if layers and layers[-1] >= self.num_hidden_layers:
                refuse(key, f"layers below num_hidden_layers {self.num_hidden_layers}", layers[-1])
        for key, ids in (("bos_token_id", (self.bos_token_id or 0,)), ("eos_token_ids", self.eos_token_ids)):
            for token_id in ids:
                if token_id >= self.vocab_size:
                    refuse(key, f"a token below vocab_size {self.vocab_size}", token_id)

    def _check_mla(self) -> None:
        if self.num_key_value_heads != self.num_attention_heads:
            expected = f"num_attention_heads {self.num_attention_heads} with attention mla"
            refuse("num_key_value_heads", expected, self.num_key_value_heads)
        for key in ("kv_lora_rank", "qk_nope_head_dim"):
            if getattr(self, key) == 0:
                refuse(key, f"{check.DIMENSION(0)} with attention mla", 0)
        for key, neutral in (
            ("attention_output_bias", False),
            ("qk_norm", False),
            ("sliding_window", None),
            ("sliding_window_layers", ()),
            ("attention_sinks", False),
        ):
            if getattr(self, key) != neutral:
                refuse(key, "absent with attention mla", getattr(self, key))

    def _check_gqa(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            expected = f"a divisor of num_attention_heads {self.num_attention_heads}"
            refuse("num_key_value_heads", expected, self.num_key_value_heads)
        for key, neutral in (("q_lora_rank", None), ("kv_lora_rank", 0), ("latent_norm_eps", None)):
            if getattr(self, key) != neutral:
                refuse(key, f"{'0' if neutral == 0 else 'null'} with attention gqa", getattr(self, key))
        if self.v_head_dim != self.qk_head_dim:
            refuse("v_head_dim", f"qk_head_dim {self.qk_head_dim} with attention gqa", self.v_head_dim)
        if (self.sliding_window is None) != (not self.sliding_window_layers):
            refuse("sliding_window", "given together with sliding_window_layers", self.sliding_window)

    def _check_router(self) -> None:
        if self.n_routed_experts % self.n_group:
            refuse("n_group", f"a divisor of n_routed_experts {self.n_routed_experts}", self.n_group)
        if self.topk_group > self.n_group:
            refuse("topk_group", f"at most n_group {self.n_group}", self.topk_group)
        group_experts = self.n_routed_experts // self.n_group
        if self.router == "sigmoid_bias_groups" and self.n_group > 1 and group_experts < 2:
            expected = "groups of at least 2 experts (a group's score is the sum of its best two)"
            refuse("n_group", expected, self.n_group)
        if self.num_experts_per_tok > self.topk_group * group_experts:
            expected = f"at most {self.topk_group * group_experts}, the experts of topk_group groups"
            refuse("num_experts_per_tok", expected, self.num_experts_per_tok)

    def _check_shared_expert(self) -> None:
        if self.n_shared_experts == 0:
            for key in ("shared_expert_intermediate_size", "shared_expert_gate"):
                if getattr(self, key):
                    refuse(key, "absent without shared experts", getattr(self, key))

    def _check_expert_gate(self) -> None:
        if (self.swiglu_alpha is None) != (self.swiglu_limit is None):
            refuse("swiglu_alpha", "given together with swiglu_limit", self.swiglu_alpha)
        is_all_moe = len(self.moe_layers) == self.num_hidden_layers and self.n_shared_experts == 0
        if self.swiglu_limit is not None and not is_all_moe:
            refuse("swiglu_limit", "absent with dense layers or shared experts", self.swiglu_limit)

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cache_width(self) -> int:
        """Numbers the KV cache holds per token and layer: latent and rotary key, or all keys and values."""
        if self.attention == "mla":
            return self.kv_lora_rank + self.qk_rope_head_dim
        return self.num_key_value_heads * (self.qk_head_dim + self.v_head_dim)

    @property
    def shared_intermediate_size(self) -> int:
        if self.shared_expert_intermediate_size is not None:
            return self.shared_expert_intermediate_size
        return self.moe_intermediate_size * self.n_shared_experts

    @property
    def softmax_scale(self) -> float:
        scaling, is_mla = self.rope_scaling, self.attention == "mla"
        mscale = scaling.softmax_mscale if is_mla and isinstance(scaling, YarnScaling) else 1.0
        return self.qk_head_dim**-0.5 * mscale * mscale

    @property
    def rope_cos_sin_scale(self) -> float:
        return self.rope_scaling.cos_sin_scale if isinstance(self.rope_scaling, YarnScaling) else 1.0

    def is_moe(self, layer: int) -> bool:
        return layer in self.moe_layers

    def window(self, layer: int) -> int | None:
        """How many positions, its own included, a query of this layer sees; None: all before it."""
        return self.sliding_window if layer in self.sliding_window_layers else None

    def to_dict(self) -> dict[str, Any]:
        """JSON types only; from_dict(to_dict()) is the same config."""
        scaling = self.rope_scaling
        return check.to_json(self) | {"rope_scaling": scaling_to_dict(scaling) if scaling else None}

    @classmethod
    def from_dict(cls, values: Any) -> "ModelConfig":
        """Strict: an unknown key, a missing key or a wrong type raises InvalidInputError naming the key."""
        arguments = check.arguments(cls, values, "")
        if isinstance(arguments["rope_scaling"], dict):
            arguments["rope_scaling"] = scaling_from_dict(arguments["rope_scaling"])
        return cls(**arguments)
