"""Which tensor gets which format: one table of exceptions, the measurement behind each in its reason.

Measured: mean KL against float32 on text of seven domains, a trained model of this architecture with 58.5 M
weights (ds3-tiny), int8 experts, groups of 128. One other kind of linear at a time in int8, beside the head,
gains less for more bytes: of 0.0223, o_proj leaves 0.0198, q_b_proj 0.0197, down_proj 0.0202, gate and up
0.0207, q_a_proj 0.0215.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kttools.families import Role
from kttools_runtime.errors import UsageError

from .rules import KEPT_FORMAT, Rule, check_all_match, deciding, expert_name, linear_name, read_rules

GPU_FORMATS = ("int4", "int8", "bf16", KEPT_FORMAT)
GROUP_SIZES = (128, 64, 32)
DEFAULT_CPU_FORMAT = "int8"
DEFAULT_GPU_FORMAT = "int4"
DEFAULT_GROUP_SIZE = 128
# A linear with a shorter side is kept in bf16: its scales would take a good part of what int4 saves, and all
# such matrices of a model together are below a thousandth of its bytes.
SMALLEST_SIDE = 32


@dataclass(frozen=True, slots=True)
class FormatException:
    """Linears whose name ends in `suffix` get `format` where the recipe says `instead_of`."""

    suffix: str
    instead_of: str
    format: str
    reason: str


EXCEPTIONS = (
    FormatException(
        "lm_head",
        "int4",
        "int8",
        "its error reaches the logits undamped: mean KL 0.029 with all in int4, 0.022 with this in int8",
    ),
    FormatException(
        "kv_a_proj_with_mqa",
        "int4",
        "int8",
        "all heads read their keys and values from it: KL 0.022 -> 0.018 for 1.5 % more bytes",
    ),
    FormatException(
        "kv_b_proj",
        "int4",
        "int8",
        "the runtime holds it as bf16 anyway, so int4 saves only disk: KL 0.018 -> 0.015",
    ),
)


@dataclass(frozen=True, slots=True)
class Recipe:
    """What quantize was asked for. cpu_format: a pack format's full name; group_size: of int4 in shards;
    KEPT_FORMAT of either: the blocks of a GGUF file as they are.

    rules: of a recipe file; they come before everything else here.
    """

    cpu_format: str
    gpu_format: str
    group_size: int
    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        if self.gpu_format not in GPU_FORMATS:
            expected = ", ".join(GPU_FORMATS)
            raise UsageError(f"unknown gpu format {self.gpu_format!r}: expected one of {expected}")
        if self.group_size not in GROUP_SIZES:
            expected = ", ".join(map(str, GROUP_SIZES))
            raise UsageError(f"unknown group size {self.group_size}: expected one of {expected}")

    def check(self, experts: Iterable[tuple[int, int]], linears: Iterable[str]) -> None:
        """Raises InvalidInputError when a rule matches no (layer, expert) and no canonical tensor name."""
        if self.rules:
            names = [linear_name(name) for name in linears]
            check_all_match(self.rules, [*(expert_name(*expert) for expert in experts), *names])

    def expert_formats(self, layer: int, num_experts: int) -> tuple[str, ...]:
        """The pack format of each expert of a model layer."""
        return tuple(self._expert_format(layer, expert) for expert in range(num_experts))

    def _expert_format(self, layer: int, expert: int) -> str:
        from kttools_runtime.experts import pack_format

        rule = deciding(self.rules, expert_name(layer, expert))
        return pack_format(rule.format) if rule else self.cpu_format

    def shard_group_size(self, name: str) -> int:
        """Inputs per group where this linear is int4."""
        rule = deciding(self.rules, linear_name(name))
        group = rule.format.partition("_g")[2] if rule else ""
        return int(group) if group else self.group_size

    def shard_format(self, name: str, role: Role, shape: tuple[int, ...]) -> str | None:
        """Format of a shard's linear by its canonical tensor name; None: stored as the source has it.

        KEPT_FORMAT: whichever keeps the source's blocks (blocks.linear_format).
        """
        is_kept = self.gpu_format == KEPT_FORMAT
        if not role.is_linear:
            return KEPT_FORMAT if is_kept and role is Role.EMBEDDING else None
        rule = deciding(self.rules, linear_name(name))
        if rule:
            return rule.format if rule.format == KEPT_FORMAT else rule.format.partition("_")[0]
        if is_kept:
            return KEPT_FORMAT
        if min(shape) < SMALLEST_SIDE:
            return "bf16"
        base = name.removesuffix(".weight")
        for exception in EXCEPTIONS:
            if exception.instead_of == self.gpu_format and base.endswith(exception.suffix):
                return exception.format
        return self.gpu_format

    def is_ruled(self, name: str) -> bool:
        """Whether a rule decides about this linear."""
        return deciding(self.rules, linear_name(name)) is not None

    def to_dict(self) -> dict[str, Any]:
        """What the manifest records."""
        exceptions = {e.suffix: e.format for e in EXCEPTIONS if e.instead_of == self.gpu_format}
        document: dict[str, Any] = {
            "cpu_format": self.cpu_format,
            "gpu_format": self.gpu_format,
            "group_size": self.group_size,
            "exceptions": exceptions,
            "smallest_side": SMALLEST_SIDE,
        }
        if self.rules:
            document["rules"] = [f"{rule.pattern} = {rule.format}" for rule in self.rules]
        return document


def make_recipe(cpu_format: str, gpu_format: str, group_size: int, rules: Path | None = None) -> Recipe:
    """From the user's words ("int4" for experts is the group size measured best); rules: a recipe file.

    Raises UsageError, and InvalidInputError for a file that is no recipe.
    """
    from kttools_runtime.experts import pack_format

    return Recipe(pack_format(cpu_format), gpu_format, group_size, read_rules(rules) if rules else ())
