"""Rotary positions from config.json: rope_scaling + rope_theta, or transformers 5's rope_parameters."""

from dataclasses import dataclass
from typing import Any

from kttools_runtime.rope_scaling import LinearScaling, Llama3Scaling, RopeScaling, YarnScaling

from .config_reader import ConfigReader

_ALWAYS = frozenset({"type", "rope_type", "rope_theta", "partial_rotary_factor"})
_KEYS: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset(
        {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    ),
    "yarn": frozenset(
        {
            "factor",
            "original_max_position_embeddings",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "attention_factor",
            "truncate",
        }
    ),
}
ALL_KINDS = tuple(_KEYS)


@dataclass(frozen=True, slots=True)
class Rope:
    """theta, how positions are stretched, and the share of a head that is rotated."""

    theta: float
    scaling: RopeScaling | None
    partial_rotary_factor: float = 1.0


def read_rope(
    reader: ConfigReader,
    theta: float = 10000.0,
    kinds: tuple[str, ...] = ALL_KINDS,
    partial_rotary_factor: float | None = None,
) -> Rope:
    """theta, partial_rotary_factor: the family's documented defaults; None: it rotates whole heads.

    Raises UnsupportedModelError for a kind beyond `kinds` and for keys that the kind does not have.
    """
    rope = _merged(reader, "rope_parameters", "rope_scaling")
    theta = rope.number("rope_theta", reader.number("rope_theta", theta))
    kind = _kind(rope, kinds)
    share = 1.0
    keys = _ALWAYS | _KEYS[kind]
    if partial_rotary_factor is None:
        keys -= {"partial_rotary_factor"}
    else:
        share = _partial(rope, reader, partial_rotary_factor)
    for key, value in rope.values.items():
        if value is not None and key not in keys:
            rope.unsupported(key, value, f"not a key of {kind} rope")
    return Rope(theta, _scaling(rope, kind, reader.integer("max_position_embeddings")), share)


def _kind(rope: ConfigReader, kinds: tuple[str, ...]) -> str:
    named = sorted({rope.text(key) for key in ("type", "rope_type") if key in rope.values})
    if len(named) > 1:
        rope.wrong("rope_type", f"the same as type {rope.values['type']!r}", rope.values["rope_type"])
    kind = named[0] if named else "default"
    if kind not in kinds:
        rope.unsupported("rope_type", kind, f"this version runs only {' or '.join(kinds)}")
    return kind


def _partial(rope: ConfigReader, reader: ConfigReader, default: float) -> float:
    share = rope.number("partial_rotary_factor", reader.number("partial_rotary_factor", default))
    if not 0.0 < share <= 1.0:
        rope.wrong("partial_rotary_factor", "a number above 0 and at most 1", share)
    return share


def _merged(reader: ConfigReader, *keys: str) -> ConfigReader:
    """The objects under `keys` as one; they may repeat each other and must not disagree."""
    values: dict[str, Any] = {}
    for key in keys:
        part = reader.child(key)
        for name, value in part.values.items() if part else ():
            if values.setdefault(name, value) != value:
                reader.wrong(f"{key}.{name}", f"{values[name]!r} as in {keys[0]}", value)
    present = next((key for key in reversed(keys) if reader.values.get(key)), keys[0])
    return ConfigReader(values, reader.where, f"{present}.")


def _scaling(rope: ConfigReader, kind: str, max_position_embeddings: int) -> RopeScaling | None:
    if kind == "default":
        return None
    factor = rope.number("factor")
    if kind == "linear":
        return LinearScaling(factor)
    original = rope.integer("original_max_position_embeddings", max_position_embeddings)
    if kind == "llama3":
        low, high = (rope.number(key) for key in ("low_freq_factor", "high_freq_factor"))
        return Llama3Scaling(factor, low, high, original)
    return _yarn(rope, factor, original)


def _yarn(rope: ConfigReader, factor: float, original: int) -> YarnScaling:
    """Defaults are transformers': beta_fast 32, beta_slow 1, also for 0 and null."""
    return YarnScaling(
        factor=factor,
        original_max_position_embeddings=original,
        beta_fast=rope.optional_number("beta_fast") or 32.0,
        beta_slow=rope.optional_number("beta_slow") or 1.0,
        mscale=rope.optional_number("mscale"),
        mscale_all_dim=rope.optional_number("mscale_all_dim"),
        attention_factor=rope.optional_number("attention_factor"),
        truncate=rope.boolean("truncate", True),
    )
