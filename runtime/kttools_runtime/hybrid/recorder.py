"""A captured graph without a GPU: the ATen calls of a computation, run again on the same tensors.

Like a CUDA graph it keeps addresses, not Python: what a computation took from a Python number, or asked of a
value on the device, would be wrong in every later step. So the second is refused while recording, and the
first makes replayed logits differ, which the tests look for.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

READS_DEVICE = ("aten._local_scalar_dense", "aten.nonzero", "aten.item", "aten.equal", "aten.is_nonzero")


class RecordedCalls(TorchDispatchMode):
    """Runs the body of its `with` and keeps its ATen calls; `replay` runs them again."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(str(func).startswith(name) for name in READS_DEVICE):
            raise RuntimeError(f"{func} reads a value of the device and cannot be part of a captured step")
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self._calls.append((func, args, kwargs, out))
        return out

    @property
    def num_calls(self) -> int:
        return len(self._calls)

    def replay(self) -> None:
        """Tensors made by recorded calls are made anew; all others are read and written where they are."""
        made: dict[int, Tensor] = {}

        def current(value: Any) -> Any:
            return made.get(id(value), value) if isinstance(value, Tensor) else value

        with torch.inference_mode():
            for func, args, kwargs, out in self._calls:
                result = func(*tree_map(current, args), **tree_map(current, kwargs))
                given = {id(value) for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)}
                for old, new in zip(tree_flatten(out)[0], tree_flatten(result)[0], strict=True):
                    if isinstance(old, Tensor) and id(old) not in given:
                        made[id(old)] = new


def recorded(work: Callable[[], object]) -> RecordedCalls:
    """The calls of work(), which is run once."""
    with torch.inference_mode(), RecordedCalls() as calls:
        work()
    return calls
