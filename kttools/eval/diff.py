"""Two models compared tensor by tensor: checkpoints, GGUF and bundles, each dequantised as it is read."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from kttools.families import Role, SourceModel, TensorSource
from kttools.families.layouts import experts_prefix
from kttools.quantize.report import ErrorSums, TensorError, by_role, error_sums, worst
from kttools_runtime.errors import InvalidInputError

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
BLOCK_BYTES = 32 << 20


@dataclass(slots=True)
class Difference:
    """errors: of every tensor both have, A as the original; the rest are names with a reason."""

    errors: list[TensorError] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def worst_relative_rms(self) -> float:
        return max((error.relative_rms for error in self.errors), default=0.0)

    def to_dict(self, worst_count: int) -> dict[str, Any]:
        return {
            "tensors": [error.to_dict() for error in self.errors],
            "roles": [role.to_dict() for role in by_role(self.errors)],
            "worst": [error.to_dict() for error in worst(self.errors, worst_count)],
            "different": sum(error.relative_rms > 0 for error in self.errors),
            "not_compared": self.missing,
        }


def compare(a: SourceModel, b: SourceModel, on_bytes: Callable[[int], object] | None = None) -> Difference:
    """Relative RMS |a - b| / |a|, largest difference and cosine of every tensor, experts one by one.

    Raises InvalidInputError when a value is not finite, or the models have no tensor in common.
    """
    report, advance = Difference(), on_bytes or (lambda _: None)
    others = {tensor.name: tensor for tensor in b.tensors}
    for tensor in a.tensors:
        other = others.pop(tensor.name, None)
        problem = _mismatch(tensor.shape, other.shape if other else None)
        if other is None or problem:
            report.missing.append(f"{tensor.name}: {problem}")
            continue
        sums = sum((_sums(tensor, x, y) for x, y in _blocks(tensor, other)), ErrorSums())
        report.errors.append(
            _error(tensor.name, tensor.role, _stored(b, other.info.name), tensor.shape, sums)
        )
        advance(tensor.bytes)
    report.missing += [f"{name}: only in {b.path}" for name in others]
    for layer in sorted({*a.moe_layers, *b.moe_layers}):
        _compare_layer(a, b, layer, report, advance)
    if not report.errors:
        raise InvalidInputError(f"{a.path} and {b.path} have no tensor in common")
    return report


def work_bytes(a: SourceModel) -> int:
    """What compare() will report through on_bytes."""
    config = a.config
    each = 3 * config.hidden_size * config.moe_intermediate_size * 4
    experts = len(a.moe_layers) * config.n_routed_experts * each
    return sum(tensor.bytes for tensor in a.tensors) + experts


def _compare_layer(
    a: SourceModel, b: SourceModel, layer: int, report: Difference, advance: Callable[[int], object]
) -> None:
    prefix = experts_prefix(layer)
    sizes = [
        (m.config.n_routed_experts, m.config.moe_intermediate_size, m.config.hidden_size) for m in (a, b)
    ]
    if layer not in a.moe_layers or layer not in b.moe_layers or sizes[0] != sizes[1]:
        shapes = [size if layer in m.moe_layers else None for m, size in zip((a, b), sizes, strict=True)]
        report.missing.append(f"{prefix}*: {_mismatch(*shapes)}")
        return
    stored = _stored(b, prefix + PROJECTIONS[0])
    for expert in range(a.config.n_routed_experts):
        pairs = zip(PROJECTIONS, a.read_expert(layer, expert), b.read_expert(layer, expert), strict=True)
        for projection, x, y in pairs:
            name = f"{prefix}{expert}.{projection}.weight"
            sums = _finite(name, _difference(x, y))
            report.errors.append(_error(name, Role.EXPERT, stored, tuple(x.shape), sums))
            advance(x.numel() * 4)


def _blocks(a: TensorSource, b: TensorSource) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    rows = a.shape[0]
    step = max(1, BLOCK_BYTES * rows // max(a.bytes, 1))
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        yield a.read_rows(begin, end), b.read_rows(begin, end)


def _sums(tensor: TensorSource, x: torch.Tensor, y: torch.Tensor) -> ErrorSums:
    return _finite(tensor.name, _difference(x, y))


def _difference(x: torch.Tensor, y: torch.Tensor) -> ErrorSums:
    return error_sums(x.to(torch.float32).numpy(), y.to(torch.float32).numpy())


def _finite(name: str, sums: ErrorSums) -> ErrorSums:
    if not sums.is_finite:
        raise InvalidInputError(
            f"tensor {name}: a value is not a finite number; nothing can be said about it"
        )
    return sums


def _error(name: str, role: Role, stored: str, shape: tuple[int, ...], sums: ErrorSums) -> TensorError:
    return TensorError.of(name, role.value, stored, shape, sums)


def _stored(source: SourceModel, name: str) -> str:
    """How the second model stores it; experts one per tensor have the dtype of all."""
    return source.checkpoint.stored(name).dtype if name in source.checkpoint else source.expert_dtype


def _mismatch(a: tuple[int, ...] | None, b: tuple[int, ...] | None) -> str:
    """Why two shapes (None: not there) cannot be compared; empty when they can."""
    if a is None or b is None:
        return f"only in the {'second' if a is None else 'first'}"
    return "" if a == b else f"shape {list(a)} and {list(b)}"
