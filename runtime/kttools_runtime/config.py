"""The canonical model configuration: kinds and sizes, no model names.

`kttools.families` translates a checkpoint's config.json into this once; bundle.json carries it as `model`;
the runtime reads nothing else. Words are those of config.json. Every value is checked at construction, so
that a ModelConfig that exists is consistent.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NoReturn

from .errors import InvalidInputError

# Bounds against hostile files: far above any model, far below what would exhaust memory in a loop.
MAX_DIMENSION = 2**31 - 1
MAX_LAYERS = 4096
MAX_EXPERTS = 65536

Check = Callable[[Any], str | None]


def _integer(low: int, high: int) -> Check:
    def check(value: Any) -> str | None:
        if type(value) is int and low <= value <= high:
            return None
        return f"an integer in {low}..{high}"

    return check


def _number(low: float, *, exclusive: bool = False) -> Check:
    def check(value: Any) -> str | None:
        is_finite = type(value) is float and math.isfinite(value)
        if is_finite and (value > low or (value == low and not exclusive)):
            return None
        return f"a finite number {'above' if exclusive else 'of at least'} {low:g}"

    return check


def _boolean(value: Any) -> str | None:
    return None if type(value) is bool else "true or false"


def _one_of(*kinds: str) -> Check:
    def check(value: Any) -> str | None:
        return None if type(value) is str and value in kinds else f"one of {', '.join(kinds)}"

    return check


def _ascending(value: Any) -> str | None:
    is_ints = type(value) is tuple and all(type(item) is int and item >= 0 for item in value)
    if is_ints and all(a < b for a, b in pairwise(value)):
        return None
    return "an ascending list of layer indices"


def _token_ids(value: Any) -> str | None:
    is_ints = type(value) is tuple and all(type(item) is int and item >= 0 for item in value)
    return None if is_ints and len(set(value)) == len(value) else "a list of distinct token ids"


def _yarn(value: Any) -> str | None:
    return None if value is None or isinstance(value, YarnScaling) else "null or an object"


def _optional(check: Check) -> Check:
    def optional(value: Any) -> str | None:
        expected = None if value is None else check(value)
        return f"null or {expected}" if expected else None

    return optional


_DIMENSION = _integer(1, MAX_DIMENSION)
_POSITIVE = _number(0.0, exclusive=True)
_FINITE = _number(-math.inf, exclusive=True)


def _checked(check: Check) -> Any:
    """A dataclass field with its check; Any, so that the annotation at the field is the type."""
    return field(metadata={"check": check})


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071) with DeepSeek's two mscales; keys as in config.json's rope_scaling."""

    factor: float = _checked(_number(1.0))
    original_max_position_embeddings: int = _checked(_DIMENSION)
    beta_fast: float = _checked(_POSITIVE)
    beta_slow: float = _checked(_POSITIVE)
    mscale: float | None = _checked(_optional(_number(0.0)))
    mscale_all_dim: float | None = _checked(_optional(_number(0.0)))
    attention_factor: float | None = _checked(_optional(_number(0.0)))
    truncate: bool = _checked(_boolean)

    def __post_init__(self) -> None:
        _check_fields(self, "rope_scaling.")
        if self.beta_fast < self.beta_slow:
            _refuse("rope_scaling.beta_fast", f"at least beta_slow {self.beta_slow:g}", self.beta_fast)

    @property
    def cos_sin_scale(self) -> float:
        """Factor on cos and sin: attention_factor, else the ratio of the two mscales, else mscale of 1."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._attention_mscale(self.mscale) / self._attention_mscale(self.mscale_all_dim)
        return self._attention_mscale(1.0)

    @property
    def softmax_mscale(self) -> float:
        """Its square multiplies the softmax scale; 1 without mscale_all_dim."""
        return self._attention_mscale(self.mscale_all_dim) if self.mscale_all_dim else 1.0

    def _attention_mscale(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1.0


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One model, as the runtime needs it, from from_dict or keywords; raises InvalidInputError."""

    vocab_size: int = _checked(_DIMENSION)
    hidden_size: int = _checked(_DIMENSION)
    intermediate_size: int = _checked(_DIMENSION)
    moe_intermediate_size: int = _checked(_DIMENSION)
    num_hidden_layers: int = _checked(_integer(1, MAX_LAYERS))
    moe_layers: tuple[int, ...] = _checked(_ascending)
    hidden_act: str = _checked(_one_of("silu"))
    rms_norm_eps: float = _checked(_POSITIVE)
    tie_word_embeddings: bool = _checked(_boolean)
    max_position_embeddings: int = _checked(_DIMENSION)
    bos_token_id: int | None = _checked(_optional(_integer(0, MAX_DIMENSION)))
    eos_token_ids: tuple[int, ...] = _checked(_token_ids)

    attention: str = _checked(_one_of("mla"))
    num_attention_heads: int = _checked(_DIMENSION)
    num_key_value_heads: int = _checked(_DIMENSION)
    q_lora_rank: int | None = _checked(_optional(_DIMENSION))
    kv_lora_rank: int = _checked(_DIMENSION)
    qk_nope_head_dim: int = _checked(_DIMENSION)
    qk_rope_head_dim: int = _checked(_DIMENSION)
    v_head_dim: int = _checked(_DIMENSION)
    attention_bias: bool = _checked(_boolean)
    rope_theta: float = _checked(_number(1.0, exclusive=True))
    rope_interleave: bool = _checked(_boolean)
    rope_scaling: YarnScaling | None = _checked(_yarn)  # noqa: RUF009

    router: str = _checked(_one_of("sigmoid_bias_groups"))
    n_routed_experts: int = _checked(_integer(1, MAX_EXPERTS))
    n_shared_experts: int = _checked(_integer(0, MAX_EXPERTS))
    num_experts_per_tok: int = _checked(_integer(1, MAX_EXPERTS))
    n_group: int = _checked(_integer(1, MAX_EXPERTS))
    topk_group: int = _checked(_integer(1, MAX_EXPERTS))
    norm_topk_prob: bool = _checked(_boolean)
    routed_scaling_factor: float = _checked(_FINITE)

    def __post_init__(self) -> None:
        _check_fields(self, "")
        self._check_layers_and_tokens()
        self._check_attention()
        self._check_router()

    def _check_layers_and_tokens(self) -> None:
        if self.moe_layers and self.moe_layers[-1] >= self.num_hidden_layers:
            expected = f"layers below num_hidden_layers {self.num_hidden_layers}"
            _refuse("moe_layers", expected, self.moe_layers[-1])
        for key, ids in (("bos_token_id", (self.bos_token_id or 0,)), ("eos_token_ids", self.eos_token_ids)):
            for token_id in ids:
                if token_id >= self.vocab_size:
                    _refuse(key, f"a token below vocab_size {self.vocab_size}", token_id)

    def _check_attention(self) -> None:
        if self.num_key_value_heads != self.num_attention_heads:
            expected = f"num_attention_heads {self.num_attention_heads} with attention mla"
            _refuse("num_key_value_heads", expected, self.num_key_value_heads)
        if self.qk_rope_head_dim % 2:
            _refuse("qk_rope_head_dim", "an even number", self.qk_rope_head_dim)

    def _check_router(self) -> None:
        if self.n_routed_experts % self.n_group:
            _refuse("n_group", f"a divisor of n_routed_experts {self.n_routed_experts}", self.n_group)
        if self.topk_group > self.n_group:
            _refuse("topk_group", f"at most n_group {self.n_group}", self.topk_group)
        group_experts = self.n_routed_experts // self.n_group
        if self.n_group > 1 and group_experts < 2:
            expected = "groups of at least 2 experts (a group's score is the sum of its best two)"
            _refuse("n_group", expected, self.n_group)
        if self.num_experts_per_tok > self.topk_group * group_experts:
            expected = f"at most {self.topk_group * group_experts}, the experts of topk_group groups"
            _refuse("num_experts_per_tok", expected, self.num_experts_per_tok)

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def shared_intermediate_size(self) -> int:
        return self.moe_intermediate_size * self.n_shared_experts

    @property
    def softmax_scale(self) -> float:
        mscale = self.rope_scaling.softmax_mscale if self.rope_scaling else 1.0
        return self.qk_head_dim**-0.5 * mscale * mscale

    @property
    def rope_cos_sin_scale(self) -> float:
        return self.rope_scaling.cos_sin_scale if self.rope_scaling else 1.0

    def is_moe(self, layer: int) -> bool:
        return layer in self.moe_layers

    def to_dict(self) -> dict[str, Any]:
        """JSON types only; from_dict(to_dict()) is the same config."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["moe_layers"] = list(self.moe_layers)
        values["eos_token_ids"] = list(self.eos_token_ids)
        values["rope_scaling"] = dataclasses.asdict(self.rope_scaling) if self.rope_scaling else None
        return values

    @classmethod
    def from_dict(cls, values: Any) -> "ModelConfig":
        """Strict: an unknown key, a missing key or a wrong type raises InvalidInputError naming the key."""
        arguments = _arguments(cls, values, "")
        if isinstance(arguments["rope_scaling"], dict):
            yarn = _arguments(YarnScaling, arguments["rope_scaling"], "rope_scaling.")
            arguments["rope_scaling"] = YarnScaling(**yarn)
        return cls(**arguments)


def _arguments(cls: type, values: Any, prefix: str) -> dict[str, Any]:
    """Keyword arguments for `cls` from JSON values: lists become tuples, integers become floats where due."""
    if not isinstance(values, dict):
        _refuse(prefix.rstrip(".") or "(top level)", "an object", values)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            raise InvalidInputError(f"model config: unknown key {prefix + str(key)!r}")
    for key in fields:
        if key not in values:
            raise InvalidInputError(f"model config: missing key {prefix + key!r}")
    return {key: _from_json(values[key], str(fields[key].type)) for key in fields}


def _from_json(value: Any, annotation: str) -> Any:
    if type(value) is list:
        return tuple(value)
    if type(value) is int and "float" in annotation:
        return _to_float(value)
    return value


def _to_float(value: int) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _check_fields(instance: Any, prefix: str) -> None:
    for f in dataclasses.fields(instance):
        value = getattr(instance, f.name)
        expected = f.metadata["check"](value)
        if expected:
            _refuse(prefix + f.name, expected, value)


def _refuse(key: str, expected: str, got: Any) -> NoReturn:
    raise InvalidInputError(f"model config: {key} must be {expected}, got {_short(got)}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
