"""The devices a model is spread over, and what they are called."""

from dataclasses import dataclass

import torch

from kttools_runtime.errors import HardwareError, UsageError

MAX_DEVICES = 16
MOST_DIGITS = 4
EXPECTED = "expected cpu, cuda:N, a list like cuda:0,cuda:1, or simulated devices cpu:0,cpu:1"


@dataclass(frozen=True, slots=True)
class Devices:
    """The devices of one model in the order of their layers; simulated ones are all the CPU."""

    names: tuple[str, ...]
    is_simulated: bool

    @property
    def torch_devices(self) -> tuple[torch.device, ...]:
        if self.is_simulated:
            return tuple(torch.device("cpu") for _ in self.names)
        return tuple(torch.device(name) for name in self.names)

    @property
    def cuda_indices(self) -> tuple[int, ...]:
        """Of real devices; () for simulated ones, which have no memory of their own."""
        return () if self.is_simulated else tuple(device.index for device in self.torch_devices)


def parse_devices(text: str) -> Devices | None:
    """None for plain "cpu", the CPU's own path; else the devices.

    cuda:0,cuda:1 are real; cpu:0,cpu:1 (or cpu,cpu) run the device path on the CPU. Raises UsageError for
    what is neither, HardwareError for a CUDA device that is not there.
    """
    names = [name.strip() for name in text.split(",")]
    if names == ["cpu"]:
        return None
    kinds = {name.partition(":")[0] for name in names}
    if not 1 <= len(names) <= MAX_DEVICES or kinds not in ({"cpu"}, {"cuda"}):
        raise UsageError(f"unknown device {text!r}: {EXPECTED}")
    numbers = [_number(name, text) for name in names]
    if kinds == {"cpu"}:
        return Devices(tuple(f"cpu:{index}" for index in range(len(names))), True)
    found = torch.cuda.device_count()
    if len(set(numbers)) != len(numbers):
        raise UsageError(f"device {text!r} names a device twice")
    if max(numbers) >= found:
        raise HardwareError(f"device {text}: torch sees {found} CUDA devices; use --device cpu")
    return Devices(tuple(f"cuda:{number}" for number in numbers), False)


def _number(name: str, text: str) -> int:
    _, colon, number = name.partition(":")
    if colon and not (number.isascii() and number.isdecimal() and len(number) <= MOST_DIGITS):
        raise UsageError(f"unknown device {text[:200]!r}: {EXPECTED}")
    return int(number or "0")
