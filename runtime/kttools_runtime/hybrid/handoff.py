"""Host buffers between a device and the expert queue, and the calls that use them."""

import torch
from torch import Tensor

from kttools_runtime import _kernels
from kttools_runtime.errors import EngineError, UsageError
from kttools_runtime.experts import ExpertLayer, as_numpy
from kttools_runtime.moe import RoutedExperts


class HandoffBuffers:
    """Pinned (on CUDA) host tensors for up to `rows` tokens: x, ids and weights down, the result up."""

    __slots__ = ("ids", "out", "weights", "x")

    def __init__(self, rows: int, hidden_size: int, k: int, dtype: torch.dtype, is_pinned: bool) -> None:
        self.x = torch.zeros(rows, hidden_size, dtype=dtype, pin_memory=is_pinned)
        self.ids = torch.full((rows, k), -1, dtype=torch.int64, pin_memory=is_pinned)
        self.weights = torch.zeros(rows, k, pin_memory=is_pinned)
        self.out = torch.zeros(rows, hidden_size, pin_memory=is_pinned)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.x, self.ids, self.weights, self.out))

    def call(self, queue: _kernels.ExpertQueue, experts: RoutedExperts) -> _kernels.ExpertCall:
        """The layer's argument block over these buffers; their input dtype must be the layer's."""
        layer = experts.layer
        if not isinstance(layer, ExpertLayer):
            raise UsageError("experts are being recorded: load the model with --device cpu for that")
        arrays = (as_numpy(t) for t in (self.x, self.ids, self.weights, self.out))
        return _kernels.ExpertCall(queue, layer.native, *arrays)


def take_down(target: Tensor, source: Tensor) -> None:
    """source into the first rows of a host buffer; on CUDA in stream order, without waiting."""
    target[: len(source)].copy_(source, non_blocking=True)


class Courier:
    """The expert queue seen by a model: a step begins sound and ends with its errors as exceptions."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.queue = _kernels.ExpertQueue(timeout_s)

    def begin(self) -> None:
        """Raises EngineError while experts of a step that failed are still being computed."""
        if not self.queue.wait_idle(self.timeout_s):
            raise EngineError(
                f"the expert engine is still busy with an earlier step after {self.timeout_s:g} s"
            )
        self.queue.take_error()

    def check(self) -> None:
        """Raises EngineError for the first thing that went wrong in this step."""
        error = self.queue.take_error()
        if error:
            raise EngineError(f"expert engine: {error}")
