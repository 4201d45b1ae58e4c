"""The tensors a config.json promises, without any file that holds them: for sizes, before a download."""

from pathlib import Path
from typing import NoReturn

import torch

from kttools.checkpoint import Info, Stored
from kttools.checkpoint.base import DecodedInfo
from kttools_runtime.config import ModelConfig
from kttools_runtime.errors import InvalidInputError

from .base import Family

ASSUMED_DTYPE = "BF16"
MAX_EXPERT_TENSORS = 1_000_000  # Kimi-K2 has 69,120; a config.json of a few bytes may ask for any number


class DeclaredWeights:
    """A checkpoint's names and shapes by its family, all in bf16; a read raises InvalidInputError."""

    def __init__(self, family: Family, config: ModelConfig, config_file: Path) -> None:
        self._file = config_file
        count = 3 * len(config.moe_layers) * config.n_routed_experts
        if count > MAX_EXPERT_TENSORS:
            raise InvalidInputError(
                f"{config_file}: {count} expert matrices without weights; at most {MAX_EXPERT_TENSORS}"
            )
        specs = family.device_tensors(config)
        self._shapes = {(spec.source_names or (spec.name,))[0]: spec.shape for spec in specs}
        layout = family.expert_layouts(config)[0]
        for layer in config.moe_layers:
            prefix = family.experts_prefix(layer)
            for part in layout.parts:
                for expert in range(1 if part.is_stacked else config.n_routed_experts):
                    self._shapes[prefix + part.name.format(expert=expert)] = part.shape

    @property
    def files(self) -> tuple[Path, ...]:
        return ()

    @property
    def index_file(self) -> Path | None:
        return self._file

    def names(self) -> list[str]:
        return list(self._shapes)

    def __contains__(self, name: object) -> bool:
        return name in self._shapes

    def __len__(self) -> int:
        return len(self._shapes)

    def info(self, name: str) -> Info:
        return DecodedInfo(name, ASSUMED_DTYPE, self._shapes[name], self._file)

    def stored(self, name: str) -> Stored:
        return Stored(ASSUMED_DTYPE, self.info(name).bytes)

    def read(self, name: str) -> torch.Tensor:
        self._refuse(name)

    def read_slice(self, name: str, index: int) -> torch.Tensor:
        self._refuse(name)

    def read_rows(self, name: str, begin: int, end: int) -> torch.Tensor:
        self._refuse(name)

    def _refuse(self, name: str) -> NoReturn:
        raise InvalidInputError(f"{self._file}: tensor {name}: there are no weights beside this file")
