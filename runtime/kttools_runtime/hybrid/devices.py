"""Which devices a model is spread over, and which layers each one gets."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..errors import HardwareError, ResourceError, UsageError

MAX_DEVICES = 16
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

    def free_bytes(self) -> list[int] | None:
        """Free memory of each device; None for simulated ones, which have no memory of their own."""
        if self.is_simulated:
            return None
        return [torch.cuda.mem_get_info(device)[0] for device in self.torch_devices]


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
    number = name.partition(":")[2] or "0"
    if ":" in name and not number.isdecimal():
        raise UsageError(f"unknown device {text!r}: {EXPECTED}")
    return int(number)


def distribute(layer_bytes: Sequence[int], budgets: Sequence[int] | None, count: int) -> list[int]:
    """The device of every layer: contiguous runs, none above its budget, the fullest as empty as can be.

    budgets: bytes for layers on each device; None: as much as wanted, shared evenly. Raises ResourceError
    when the layers do not fit.
    """
    total = sum(layer_bytes)
    shares = [total / count] * count if budgets is None else _shares(total, budgets)
    placed: list[int] = []
    device, used, passed = 0, 0, 0.0
    for index, size in enumerate(layer_bytes):
        left = len(layer_bytes) - index
        is_over = budgets is not None and used + size > budgets[device]
        is_enough = passed + used + size / 2 > sum(shares[: device + 1]) and used > 0
        if device + 1 < count and (is_over or is_enough or left < count - device):
            passed += used
            device, used = device + 1, 0
        used += size
        placed.append(device)
        if budgets is not None and used > budgets[device]:
            raise ResourceError(
                f"{total / 1e9:.2f} GB of layers do not fit into {sum(budgets) / 1e9:.2f} GB of device "
                "memory: use more devices, a shorter cache or smaller shards"
            )
    return placed


def _shares(total: int, budgets: Sequence[int]) -> list[float]:
    whole = sum(budgets)
    if whole <= 0:
        raise ResourceError("the devices have no memory left for the model's layers")
    return [total * budget / whole for budget in budgets]
