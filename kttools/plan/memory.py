"""Memory of a loaded model by part, for a layout and a choice: the runtime's own accounting, applied."""

from dataclasses import dataclass
from functools import cache

import torch

from kttools_runtime import memory
from kttools_runtime.config import ModelConfig
from kttools_runtime.device_footprint import DeviceFootprint, hot_rooms, most_hot_experts, with_hot_experts
from kttools_runtime.footprint import Footprint
from kttools_runtime.hybrid.choose import choose_hot, hit_share
from kttools_runtime.hybrid.hot_request import HotRequest
from kttools_runtime.load_plan import LoadRequest
from kttools_runtime.model import DEFAULT_CACHE_LEN

from .layout import Layout


@dataclass(frozen=True, slots=True)
class Machine:
    """What there is. vram: bytes of each GPU; nodes: memory nodes."""

    ram_bytes: int
    vram: tuple[int, ...]
    nodes: int


@dataclass(frozen=True, slots=True)
class Needs:
    """What a choice takes. libraries: of the process before anything is loaded; devices: GPUs in order.

    most_hot: routed experts of all layers together that fit beside the rest, at most all; most_per_layer: as
    many of every layer; hot: those of all layers that are planned there. hot_share, most_share: of a token's
    choices, those that go to the planned ones, and would go to as many as fit.
    """

    ram: Footprint
    libraries: int
    devices: tuple[DeviceFootprint, ...]
    most_hot: int
    most_per_layer: int
    hot: int
    hot_share: float
    most_share: float

    @property
    def ram_total(self) -> int:
        return self.ram.total + self.libraries

    @property
    def process(self) -> int:
        """Libraries, and what they grow by."""
        return self.ram.process + self.libraries

    def node_bytes(self) -> tuple[int, ...]:
        """RAM of each memory node in use; libraries, cache and scratch on the first."""
        first, *rest = self.ram.node_bytes()
        return (first + self.libraries, *rest)

    def fits(self, machine: Machine) -> bool:
        return self.ram_total <= machine.ram_bytes and all(
            device.total <= limit for device, limit in zip(self.devices, machine.vram, strict=True)
        )


def needs(
    layout: Layout,
    cache_len: int,
    numa: str,
    threads: int,
    machine: Machine,
    gpu_experts: HotRequest | None = None,
) -> Needs:
    """RAM, and VRAM of every GPU of the machine. Which experts are hot is the rule of a load."""
    config = layout.config
    request = LoadRequest(
        config=config,
        tensors=layout.tensors,
        experts=layout.pack_bytes,
        tokenizer=layout.tokenizer_bytes,
        cache_len=cache_len,
        dtype=torch.bfloat16,
        threads=threads,
        numa=numa,
        nodes=machine.nodes,
        devices=tuple(range(len(machine.vram))),
    )
    devices, moe, each = request.on_devices(), config.moe_layers, layout.hot_expert_bytes
    rooms = hot_rooms(devices, moe, each, config.n_routed_experts, machine.vram)
    most = min(most_hot_experts(devices, moe, each, machine.vram), config.n_routed_experts) if each else 0
    asked = gpu_experts or HotRequest(0, {})
    chosen = choose_hot(asked, config, devices, rooms) if devices else {}
    fullest = choose_hot(asked.with_number(None), config, devices, rooms) if devices else {}
    return Needs(
        request.host(),
        libraries_bytes(),
        with_hot_experts(devices, {layer: len(ids) for layer, ids in chosen.items()}, each),
        sum(rooms),
        most,
        sum(map(len, chosen.values())),
        hit_share(asked.counts, chosen, config),
        hit_share(asked.counts, fullest, config),
    )


@cache
def libraries_bytes() -> int:
    """What this process held when first asked: the interpreter, torch and this package."""
    return memory.resident_bytes()


def default_cache_len(config: ModelConfig) -> int:
    """What a model takes when nobody says."""
    return min(config.max_position_embeddings, DEFAULT_CACHE_LEN)
