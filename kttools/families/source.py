"""A checkpoint matched against its family: every tensor accounted for, checked, and read lazily."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kttools.checkpoint import Info, Weights
from kttools_runtime.config import ModelConfig
from kttools_runtime.errors import InvalidInputError

from .base import ExpertLayout, ExpertPart, Family, Role, TensorSpec

READABLE_DTYPES = ("BF16", "F16", "F32")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "generation_config.json",
)


@dataclass(frozen=True, slots=True)
class TensorSource:
    """One non-expert tensor of a checkpoint under its canonical name."""

    name: str
    role: Role
    info: Info
    checkpoint: Weights

    @property
    def shape(self) -> tuple[int, ...]:
        return self.info.shape

    @property
    def dtype(self) -> str:
        return self.info.dtype

    @property
    def bytes(self) -> int:
        return self.info.bytes

    @property
    def file(self) -> Path:
        return self.info.file

    def read(self) -> torch.Tensor:
        """The tensor in bf16, f16 or f32 (`dtype`) in fresh memory."""
        return self.checkpoint.read(self.info.name)

    def read_rows(self, begin: int, end: int) -> torch.Tensor:
        """Rows [begin, end) of the leading dimension."""
        return self.checkpoint.read_rows(self.info.name, begin, end)


class SourceModel:
    """What quantize works from. Construction checks everything that headers can show; data is read on demand.

    path: the directory or file the user named; config_dir: where config and tokenizer files lie, None when
    the checkpoint brings its own (tokenizer_data: their content by name). Picklable, safe to share between
    threads. Raises InvalidInputError naming tensor, file, expected and got.
    """

    def __init__(
        self,
        path: Path,
        family: Family,
        config: ModelConfig,
        source_config: dict[str, Any],
        notices: list[str],
        checkpoint: Weights,
        config_dir: Path | None,
        tokenizer_data: Mapping[str, bytes] | None = None,
    ) -> None:
        self.path = path
        self.config_dir = config_dir
        self.tokenizer_data = dict(tokenizer_data or {})
        self.family = family.name
        self.config = config
        self.source_config = source_config
        self.checkpoint = checkpoint
        matcher = _Matcher(family, config, self.checkpoint)
        self.tensors = matcher.device_tensors()
        self._layouts = {layer: matcher.layout(layer) for layer in config.moe_layers}
        self._prefixes = {layer: family.experts_prefix(layer) for layer in config.moe_layers}
        self._expert_dtypes = frozenset(matcher.expert_dtypes)
        self.notices = notices + matcher.notices()
        self.source_bytes = matcher.source_bytes
        if "tokenizer.json" not in self.tokenizer_names:
            self.notices.append(
                f"{path}: no tokenizer.json; a bundle made of it can compute but not read or write text"
            )

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return self.config.moe_layers

    @property
    def expert_dtype(self) -> str:
        """dtype of all routed experts; F32 when they are mixed (it holds every value of the others)."""
        return next(iter(self._expert_dtypes)) if len(self._expert_dtypes) == 1 else "F32"

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file the result depends on: config, index, shards."""
        index = self.checkpoint.index_file
        names = ("config.json", "generation_config.json") if self.config_dir else ()
        configs = [self.config_dir / name for name in names if self.config_dir]
        return (
            *(file for file in configs if file.is_file()),
            *((index,) if index else ()),
            *self.checkpoint.files,
        )

    @property
    def card_dir(self) -> Path | None:
        """Where the model's card and licence would lie: the directory the user named."""
        return self.path if self.path.is_dir() else self.config_dir

    @property
    def tokenizer_files(self) -> dict[str, Path]:
        """Name in the bundle's tokenizer/ -> file, for those that exist."""
        if self.config_dir is None:
            return {}
        found = {name: self.config_dir / name for name in TOKENIZER_FILES}
        return {name: file for name, file in found.items() if file.is_file()}

    @property
    def tokenizer_names(self) -> list[str]:
        """Files of the bundle's tokenizer/, copied or rebuilt."""
        return sorted({*self.tokenizer_files, *self.tokenizer_data})

    def read_expert(self, layer: int, expert: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """gate [I, H], up [I, H], down [H, I] as stored; nothing else of the layer is read.

        Fused gate and up share one allocation.
        """
        layout, prefix = self._layouts[layer], self._prefixes[layer]
        if not 0 <= expert < self.config.n_routed_experts:
            raise IndexError(f"layer {layer} has no expert {expert}")
        if layout.gate.name == layout.up.name:
            gate, up = self._read_part(layout.gate, prefix, expert).chunk(2)
        else:
            gate, up = (self._read_part(part, prefix, expert) for part in (layout.gate, layout.up))
        return gate, up, self._read_part(layout.down, prefix, expert)

    def expert_names(self, layer: int, expert: int) -> tuple[tuple[str, int | None], ...]:
        """Tensor of the checkpoint, and its slice where experts are stacked, of gate, up and down.

        Fused gate and up are twice the same.
        """
        layout, prefix = self._layouts[layer], self._prefixes[layer]
        return tuple(
            (prefix + part.name, expert)
            if part.is_stacked
            else (prefix + part.name.format(expert=expert), None)
            for part in (layout.gate, layout.up, layout.down)
        )

    def _read_part(self, part: ExpertPart, prefix: str, expert: int) -> torch.Tensor:
        if part.is_stacked:
            return self.checkpoint.read_slice(prefix + part.name, expert)
        return self.checkpoint.read(prefix + part.name.format(expert=expert))

    def expert_layout(self, layer: int) -> str:
        """How the checkpoint stores the layer's experts, in words."""
        return self._layouts[layer].title

    def parameters_by_role(self) -> dict[Role, int]:
        """Number of parameters of each role that occurs, experts included."""
        counts: dict[Role, int] = {}
        for tensor in self.tensors:
            counts[tensor.role] = counts.get(tensor.role, 0) + math.prod(tensor.shape)
        config = self.config
        if config.moe_layers:
            each = 3 * config.hidden_size * config.moe_intermediate_size
            counts[Role.EXPERT] = len(config.moe_layers) * config.n_routed_experts * each
        return counts


class _Matcher:
    """Takes tensors out of the checkpoint's names until none is left; what remains must have a reason."""

    def __init__(self, family: Family, config: ModelConfig, checkpoint: Weights) -> None:
        self.family = family
        self.config = config
        self.checkpoint = checkpoint
        self.layouts = family.expert_layouts(config)
        self.matched: set[str] = set()
        self.expert_dtypes: set[str] = set()
        self.source_bytes = 0

    def device_tensors(self) -> list[TensorSource]:
        sources = []
        for spec in self.family.device_tensors(self.config):
            info = self._take(self._source_name(spec), spec.shape)
            sources.append(TensorSource(spec.name, spec.role, info, self.checkpoint))
        return sources

    def _source_name(self, spec: TensorSpec) -> str:
        """The first of its names that is there; the hub's when none is."""
        names = spec.source_names or (spec.name,)
        return next((name for name in names if name in self.checkpoint), names[0])

    def layout(self, layer: int) -> ExpertLayout:
        """The layout this layer uses: the first of which any tensor is present; then all of it must be."""
        prefix = self.family.experts_prefix(layer)
        for layout in self.layouts:
            if all(prefix + part.name.format(expert=0) in self.checkpoint for part in layout.parts):
                break
        else:
            layout = self.layouts[0]
        for name, shape in self._expert_tensors(layout, prefix):
            self.expert_dtypes.add(self._take(name, shape).dtype)
        return layout

    def notices(self) -> list[str]:
        """Why tensors are left out, with counts. Raises InvalidInputError for a tensor without a reason."""
        names = frozenset(self.checkpoint.names())
        reasons: dict[str, int] = {}
        for name in self.checkpoint.names():
            if name in self.matched:
                continue
            reason = self.family.left_out(name, self.config, names)
            if reason is None:
                info = self.checkpoint.info(name)
                got = f"{info.dtype} {list(info.shape)}"
                raise InvalidInputError(
                    f"{info.file}: unexpected tensor {name!r:.200} ({got}); {self.family.title} with this "
                    "config.json has no such tensor"
                )
            reasons[reason] = reasons.get(reason, 0) + 1
        return [f"left out: {reason} ({count} tensors)" for reason, count in reasons.items()]

    def _expert_tensors(self, layout: ExpertLayout, prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        for part in dict.fromkeys((part.name, part.shape, part.is_stacked) for part in layout.parts):
            name, shape, is_stacked = part
            experts = range(1) if is_stacked else range(self.config.n_routed_experts)
            for expert in experts:
                yield prefix + name.format(expert=expert), shape

    def _take(self, name: str, shape: tuple[int, ...]) -> Info:
        if name not in self.checkpoint:
            where = self.checkpoint.index_file or self.checkpoint.files[0]
            raise InvalidInputError(f"{where}: tensor {name} is missing, expected shape {list(shape)}")
        info = self.checkpoint.info(name)
        if info.shape != shape:
            got = f"expected shape {list(shape)} by config.json, got {list(info.shape)}"
            raise InvalidInputError(f"{info.file}: tensor {name}: {got}")
        if info.dtype not in READABLE_DTYPES:
            raise InvalidInputError(
                f"{info.file}: tensor {name}: expected dtype {', '.join(READABLE_DTYPES)}, got {info.dtype}"
            )
        self.matched.add(name)
        self.source_bytes += self.checkpoint.stored(name).bytes
        return info
