"""How a model stretches its rotary positions beyond the context it was first trained on.

Keys are those of config.json's rope_scaling. The angles themselves are made in rope.py.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from . import config_checks as check
from .config_checks import check_fields, checked, refuse


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071) with DeepSeek's two mscales."""

    factor: float = checked(check.number(1.0))
    original_max_position_embeddings: int = checked(check.DIMENSION)
    beta_fast: float = checked(check.POSITIVE)
    beta_slow: float = checked(check.POSITIVE)
    mscale: float | None = checked(check.optional(check.number(0.0)))
    mscale_all_dim: float | None = checked(check.optional(check.number(0.0)))
    attention_factor: float | None = checked(check.optional(check.number(0.0)))
    truncate: bool = checked(check.boolean)

    def __post_init__(self) -> None:
        check_fields(self, "rope_scaling.")
        if self.beta_fast < self.beta_slow:
            refuse("rope_scaling.beta_fast", f"at least beta_slow {self.beta_slow:g}", self.beta_fast)

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
        """Its square multiplies the softmax scale of attention mla; 1 without mscale_all_dim."""
        return self._attention_mscale(self.mscale_all_dim) if self.mscale_all_dim else 1.0

    def _attention_mscale(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1.0


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Every position divided by `factor` (arXiv 2306.15595)."""

    factor: float = checked(check.number(1.0))

    def __post_init__(self) -> None:
        check_fields(self, "rope_scaling.")


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama 3.1's rule: waves longer than original / low_freq_factor positions are stretched by `factor`,
    those shorter than original / high_freq_factor are kept, the ones between blend."""

    factor: float = checked(check.number(1.0))
    low_freq_factor: float = checked(check.POSITIVE)
    high_freq_factor: float = checked(check.POSITIVE)
    original_max_position_embeddings: int = checked(check.DIMENSION)

    def __post_init__(self) -> None:
        check_fields(self, "rope_scaling.")
        if self.high_freq_factor <= self.low_freq_factor:
            expected = f"above low_freq_factor {self.low_freq_factor:g}"
            refuse("rope_scaling.high_freq_factor", expected, self.high_freq_factor)


RopeScaling = YarnScaling | LinearScaling | Llama3Scaling
# YaRN was the only kind of the first bundles and is the one that is written without rope_type.
KINDS: dict[str, type[RopeScaling]] = {"yarn": YarnScaling, "linear": LinearScaling, "llama3": Llama3Scaling}


def scaling_from_dict(values: Any) -> RopeScaling:
    """From bundle.json. Raises InvalidInputError naming the key."""
    if not isinstance(values, dict) or "rope_type" not in values:
        return YarnScaling(**check.arguments(YarnScaling, values, "rope_scaling."))
    kind = values["rope_type"]
    others = [name for name in KINDS if name != "yarn"]
    if kind not in others:
        refuse("rope_scaling.rope_type", f"absent (yarn) or one of {', '.join(others)}", kind)
    rest = {key: value for key, value in values.items() if key != "rope_type"}
    return KINDS[kind](**check.arguments(KINDS[kind], rest, "rope_scaling."))


def scaling_to_dict(scaling: RopeScaling) -> dict[str, Any]:
    values = dataclasses.asdict(scaling)
    kind = next(name for name, cls in KINDS.items() if type(scaling) is cls)
    return values if kind == "yarn" else {"rope_type": kind} | values
