"""What a fuzz target is."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Target:
    """seeds(folder): files to start from. run(file): raises InvalidInputError or its kin, or returns.

    parse(data): the same without a file, for many inputs in little time.
    """

    suffix: str
    seeds: Callable[[Path], list[bytes]]
    run: Callable[[Path], None]
    parse: Callable[[bytes], None] | None = None
