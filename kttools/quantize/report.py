"""The error of every quantised matrix: measured on what was stored, summed in float64, written as JSON."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kttools_runtime import _kernels, strict_json

REPORT_NAME = "quantization-report.json"
FORMAT = "kttools-quantization-report"
VERSION = 1
# Six digits: more say nothing, and the last bits of a float64 sum depend on the order of its blocks, while
# the report must be the same bytes on every machine.
DIGITS = 6
BLOCK_ELEMENTS = 1 << 18
WORST = 8


@dataclass(frozen=True, slots=True)
class ErrorSums:
    """Sums over elements, in float64, of squares of source, stored and difference; addable."""

    source_square: float = 0.0
    stored_square: float = 0.0
    error_square: float = 0.0
    max_abs_error: float = 0.0

    def __add__(self, other: "ErrorSums") -> "ErrorSums":
        return ErrorSums(
            self.source_square + other.source_square,
            self.stored_square + other.stored_square,
            self.error_square + other.error_square,
            max(self.max_abs_error, other.max_abs_error),
        )

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.source_square + self.stored_square + self.error_square)

    @property
    def relative_rms(self) -> float:
        """|source - stored| / |source|; 0 when both are zero, 1 when only the source is."""
        if self.source_square == 0.0:
            return 0.0 if self.error_square == 0.0 else 1.0
        return math.sqrt(self.error_square / self.source_square)

    @property
    def cosine(self) -> float:
        """Of the angle between source and stored; 1 when both are zero."""
        norms = math.sqrt(self.source_square) * math.sqrt(self.stored_square)
        if norms == 0.0:
            return 1.0 if self.source_square == self.stored_square else 0.0
        dot = (self.source_square + self.stored_square - self.error_square) / 2
        return max(-1.0, min(1.0, dot / norms))


def error_sums(source: np.ndarray, stored: np.ndarray) -> ErrorSums:
    """source: float32, float16 or bf16 as uint16; stored: float32 or bf16 as uint16. Same shape."""
    if source.shape != stored.shape:
        raise ValueError(f"source has shape {source.shape}, stored {stored.shape}")
    total = ErrorSums()
    flat_source, flat_stored = source.reshape(-1), stored.reshape(-1)
    for begin in range(0, flat_source.size, BLOCK_ELEMENTS):
        block = slice(begin, begin + BLOCK_ELEMENTS)
        sums = _kernels.error_sums(as_float32(flat_source[block]), as_float32(flat_stored[block]))
        total += ErrorSums(*sums)
    return total


def expert_errors(format_name: str, arrays: Sequence[np.ndarray], blob: np.ndarray) -> list[ErrorSums]:
    """Of gate, up and down, each float32 or bf16 as uint16, against the blob that holds them."""
    gate, up, down = arrays
    return [ErrorSums(*sums) for sums in _kernels.expert_errors(format_name, gate, up, down, blob)]


def as_float32(values: np.ndarray) -> np.ndarray:
    """float32 of float16, or of bf16 bit patterns (uint16); float32 itself."""
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32, copy=False)


@dataclass(frozen=True, slots=True)
class TensorError:
    """One matrix of the report."""

    name: str
    role: str
    format: str
    shape: tuple[int, ...]
    relative_rms: float
    max_abs_error: float
    cosine: float

    @classmethod
    def of(
        cls, name: str, role: str, format_name: str, shape: tuple[int, ...], sums: ErrorSums
    ) -> "TensorError":
        numbers = (sums.relative_rms, sums.max_abs_error, sums.cosine)
        return cls(name, role, format_name, shape, *map(_rounded, numbers))

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "role": self.role,
            "format": self.format,
            "shape": list(self.shape),
            "relative_rms": self.relative_rms,
            "max_abs_error": self.max_abs_error,
            "cosine": self.cosine,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TensorError":
        return cls(**{**values, "shape": tuple(values["shape"])})


@dataclass(frozen=True, slots=True)
class RoleError:
    """Means over the matrices of one role and format."""

    role: str
    format: str
    matrices: int
    mean_relative_rms: float
    worst_relative_rms: float
    mean_cosine: float

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


def by_role(errors: Iterable[TensorError]) -> list[RoleError]:
    """One entry per (role, format), roles in alphabetical order."""
    groups: dict[tuple[str, str], list[TensorError]] = {}
    for error in errors:
        groups.setdefault((error.role, error.format), []).append(error)
    return [_role_error(role, name, group) for (role, name), group in sorted(groups.items())]


def _role_error(role: str, format_name: str, group: Sequence[TensorError]) -> RoleError:
    count = len(group)
    return RoleError(
        role,
        format_name,
        count,
        _rounded(math.fsum(error.relative_rms for error in group) / count),
        max(error.relative_rms for error in group),
        _rounded(math.fsum(error.cosine for error in group) / count),
    )


def worst(errors: Iterable[TensorError], count: int = WORST) -> list[TensorError]:
    """The matrices with the largest relative RMS error above zero, largest first."""
    ordered = sorted(errors, key=lambda error: (-error.relative_rms, error.name))
    return [error for error in ordered[:count] if error.relative_rms > 0]


def report_bytes(recipe: dict[str, Any], errors: Sequence[TensorError]) -> bytes:
    """quantization-report.json: recipe, means by role, then every matrix in model order."""
    document = {
        "format": FORMAT,
        "version": VERSION,
        "recipe": recipe,
        "roles": [role.to_dict() for role in by_role(errors)],
        "tensors": [error.to_dict() for error in errors],
    }
    return strict_json.canonical(document)


def summary(errors: Sequence[TensorError]) -> str:
    """The report as text: a line per role and format, then the worst matrices."""
    header = (
        f"{'role':<14} {'format':<10} {'matrices':>8}  {'mean rel. rms':>13}  {'worst':>9}  {'cosine':>9}"
    )
    lines = [header]
    lines += [
        f"{r.role:<14} {r.format:<10} {r.matrices:>8}  {r.mean_relative_rms:>13.6f}  "
        f"{r.worst_relative_rms:>9.6f}  {r.mean_cosine:>9.6f}"
        for r in by_role(errors)
    ]
    listed = worst(errors)
    if listed:
        lines.append("worst by relative rms:")
        lines += [f"  {e.relative_rms:.6f}  max {e.max_abs_error:.3g}  {e.format}  {e.name}" for e in listed]
    return "\n".join(lines)


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS - 1}e}")
