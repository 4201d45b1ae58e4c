"""What a user asks of the hybrid path, checked."""

from dataclasses import dataclass

from kttools_runtime.config import ModelConfig
from kttools_runtime.errors import UsageError

from .devices import Devices
from .prefill import POLICIES


@dataclass(frozen=True, slots=True)
class HybridOptions:
    """defer_experts: of a token and layer, delivered one layer later. gpu_experts: "auto", a number for every
    layer, a file, or None. prefill: "auto", "cpu" or "gpu". graphs: capture decode steps."""

    devices: Devices
    defer_experts: int = 0
    gpu_experts: str | None = None
    prefill: str = "auto"
    graphs: bool = True

    def check(self, config: ModelConfig) -> None:
        """Raises UsageError for what this model or these devices cannot do."""
        if not 0 <= self.defer_experts < max(1, config.num_experts_per_tok):
            most = max(0, config.num_experts_per_tok - 1)
            raise UsageError(f"defer_experts must be 0 to {most}, got {self.defer_experts}")
        if self.prefill not in POLICIES:
            raise UsageError(f"prefill must be one of {', '.join(POLICIES)}, got {self.prefill!r}")
        if len(self.devices.names) > config.num_hidden_layers:
            raise UsageError(
                f"{len(self.devices.names)} devices for {config.num_hidden_layers} layers: name fewer"
            )


def needs_device(defer_experts: int, gpu_experts: str | None, prefill: str) -> None:
    """Raises UsageError when an option of the device path is given with the plain CPU path."""
    given = {
        "--defer-experts": bool(defer_experts),
        "--gpu-experts": gpu_experts is not None,
        "--prefill": prefill != "auto",
    }
    for name, is_given in given.items():
        if is_given:
            raise UsageError(f"{name} needs a device: --device cuda:0, or cpu:0 to try it on the CPU")
