"""One interface over a CUDA stream and a simulated one: computations, copies and host functions in order.

A program is a function that issues these on a stream. It is run, or captured once and replayed: on CUDA as a
CUDA graph, in the simulation as the list of its operations with the computations as recorded ATen calls.
"""

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from kttools_runtime import _kernels
from kttools_runtime.errors import EngineError
from kttools_runtime.experts import as_numpy

from .recorder import recorded

Work = Callable[[], object]
# Beyond the queue's own timeouts a simulated stream waits only for torch on this CPU.
SLACK_S = 600.0


class Stream(Protocol):
    """What a program is issued on."""

    def compute(self, work: Work) -> None:
        """Device work; its tensors live on the stream's device."""

    def copy(self, to: Tensor, source: Tensor) -> None:
        """Contiguous tensors of one shape and dtype, host (pinned) or device."""

    def host(self, function: int, argument: int) -> None:
        """A C function void(void*) at this address, run by a thread that must not call the device."""


Program = Callable[[Stream], None]


class DeviceStream(Stream, Protocol):
    """A stream that is synchronised, and captures programs."""

    def capture(self, program: Program) -> Callable[[], None]:
        """Issue the program once without its host functions; what is returned enqueues it whole."""

    def follow(self, other: Any) -> None:
        """What is issued from now on runs after all that `other` was given so far."""

    def follow_default(self) -> None:
        """What is issued from now on runs after what torch's own stream of the device was given."""

    def record(self) -> Any:
        """An event behind all that was issued so far."""

    def wait(self, event: Any) -> None:
        """What is issued from now on runs after an event of any stream of this kind."""

    def hold(self, event: Any) -> None:
        """The host waits for an event."""

    def synchronize(self) -> None:
        """Wait until all is done. Raises what a computation raised."""


class CudaStream:
    """A stream of a CUDA device. Not measured on a GPU yet."""

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None = None) -> None:
        """stream: torch's own, or None for a new one."""
        self.device = device
        self.stream = stream or torch.cuda.Stream(device)

    def compute(self, work: Work) -> None:
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            work()

    def copy(self, to: Tensor, source: Tensor) -> None:
        self.compute(functools.partial(to.copy_, source, non_blocking=True))

    def host(self, function: int, argument: int) -> None:
        _kernels.launch_host_function(self.stream.cuda_stream, function, argument)

    def capture(self, program: Program) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        self.synchronize()
        with torch.cuda.device(self.device), torch.cuda.graph(graph, stream=self.stream):
            program(self)

        def replay() -> None:
            with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
                graph.replay()

        return replay

    def follow(self, other: "CudaStream") -> None:
        self.stream.wait_stream(other.stream)

    def follow_default(self) -> None:
        self.stream.wait_stream(torch.cuda.default_stream(self.device))

    def record(self) -> torch.cuda.Event:
        return self.stream.record_event()

    def wait(self, event: torch.cuda.Event) -> None:
        self.stream.wait_event(event)

    def hold(self, event: torch.cuda.Event) -> None:
        event.synchronize()

    def synchronize(self) -> None:
        self.stream.synchronize()


class SimulatedStream:
    """A stream on the CPU: a C++ thread that runs what it is given in order (csrc/sim_stream.h)."""

    def __init__(self) -> None:
        self.native = _kernels.SimStream()
        self._event = _kernels.SimEvent()

    def compute(self, work: Work) -> None:
        self.native.compute(functools.partial(_in_inference_mode, work))

    def copy(self, to: Tensor, source: Tensor) -> None:
        self.native.copy(as_numpy(to), as_numpy(source))

    def host(self, function: int, argument: int) -> None:
        self.native.host(function, argument)

    def capture(self, program: Program) -> Callable[[], None]:
        self.synchronize()
        listed = _Listed()
        program(listed)

        def replay() -> None:
            for issue in listed.issues:
                issue(self)

        return replay

    def follow(self, other: "SimulatedStream") -> None:
        other.native.record(other._event)
        self.native.wait(other._event)

    def follow_default(self) -> None:
        pass  # torch on the CPU is done when it returns

    def record(self) -> _kernels.SimEvent:
        event = _kernels.SimEvent()
        self.native.record(event)
        return event

    def wait(self, event: _kernels.SimEvent) -> None:
        self.native.wait(event)

    def hold(self, event: _kernels.SimEvent) -> None:
        if not event.hold(SLACK_S):
            raise EngineError(f"a simulated device did not finish within {SLACK_S:.0f} s")

    def synchronize(self) -> None:
        if not self.native.synchronize(SLACK_S):
            raise EngineError(f"a simulated device did not finish within {SLACK_S:.0f} s")


class _Listed:
    """A stream that issues nothing: it keeps the operations of a program, computations recorded."""

    def __init__(self) -> None:
        self.issues: list[Callable[[SimulatedStream], None]] = []

    def compute(self, work: Work) -> None:
        calls = recorded(work)
        self.issues.append(lambda stream: stream.native.compute(calls.replay))

    def copy(self, to: Tensor, source: Tensor) -> None:
        arrays = as_numpy(to), as_numpy(source)
        self.issues.append(lambda stream: stream.native.copy(*arrays))

    def host(self, function: int, argument: int) -> None:
        self.issues.append(lambda stream: stream.native.host(function, argument))


def _in_inference_mode(work: Work) -> None:
    with torch.inference_mode():
        work()


def make_stream(device: torch.device) -> CudaStream | SimulatedStream:
    """The stream of a device's steps."""
    return CudaStream(device) if device.type == "cuda" else SimulatedStream()


def main_stream(device: torch.device) -> CudaStream | SimulatedStream:
    """What torch issues on by itself, as one of our streams; a simulated device's is a new one."""
    return (
        CudaStream(device, torch.cuda.current_stream(device)) if device.type == "cuda" else SimulatedStream()
    )
