"""Before a load: what it will take, what is free, and an error that names the nearest plan that fits."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch

from . import memory
from .config import ModelConfig
from .device_footprint import DeviceFootprint, device_footprints, most_hot_experts, with_hot_experts
from .errors import ResourceError
from .footprint import EMBEDDING, Footprint, StoredTensor, footprint
from .numa import share_nodes

SHORTEST_CACHE = 2048
# An allowance, not measured: CUDA's libraries and driver in the RAM of a process that uses it.
HOST_CONTEXT_BYTES = 1 << 30
GIB = float(1 << 30)


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """What decides the sizes of a load. experts, tokenizer: bytes of files.

    numa: off, shard or replicate, over `nodes` memory nodes; devices: indices of GPUs, () for the CPU alone;
    hot_experts: (layer, routed experts of it on them), of expert_bytes each.
    """

    config: ModelConfig
    tensors: tuple[StoredTensor, ...]
    experts: int
    tokenizer: int
    cache_len: int
    dtype: torch.dtype
    threads: int
    numa: str
    nodes: int
    devices: tuple[int, ...] = ()
    is_streamed: bool = False
    hot_experts: tuple[tuple[int, int], ...] = ()
    expert_bytes: int = 0

    def host(self) -> Footprint:
        """RAM. With GPUs the layers' dense weights and the cache are theirs."""
        numa = share_nodes(self.experts, self.numa, self.threads, self.nodes)
        tensors: Iterable[StoredTensor] = self.tensors
        cache_len = self.cache_len
        if self.devices:
            tensors, cache_len = [t for t in self.tensors if t.name == EMBEDDING], 0
        found = footprint(
            self.config,
            tensors,
            self.experts,
            numa,
            cache_len,
            self.dtype,
            self.threads,
            self.tokenizer,
            self.is_streamed,
        )
        return replace(found, process=found.process + HOST_CONTEXT_BYTES) if self.devices else found

    def on_devices(self) -> tuple[DeviceFootprint, ...]:
        """VRAM of each GPU."""
        if not self.devices:
            return ()
        streamed = self.experts // max(1, len(self.config.moe_layers) * self.config.n_routed_experts)
        found = device_footprints(
            self.config,
            self.tensors,
            self.cache_len,
            len(self.devices),
            self.dtype,
            expert_bytes=streamed,
        )
        return with_hot_experts(found, dict(self.hot_experts), self.expert_bytes)


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """A request, what it takes and what is free (bytes; VRAM per device of the request)."""

    request: LoadRequest
    ram: Footprint
    ram_free: int
    vram: tuple[DeviceFootprint, ...] = ()
    vram_free: tuple[int, ...] = ()

    @property
    def fits(self) -> bool:
        is_vram_enough = all(d.total <= free for d, free in zip(self.vram, self.vram_free, strict=True))
        return self.ram.total <= self.ram_free and is_vram_enough

    def line(self) -> str:
        """The plan in a line."""
        ram = self.ram
        parts = f"{_gib(ram.experts)} experts mapped, {_gib(ram.dense)} dense, {_gib(ram.cache)} cache"
        copies = f", {_gib(ram.copies)} copies per node" if ram.copies else ""
        text = f"RAM {_gib(ram.total)} of {_gib(self.ram_free)} GiB free ({parts}{copies})"
        for index, (device, free) in enumerate(zip(self.vram, self.vram_free, strict=True)):
            text += f"; cuda:{self.request.devices[index]} {_gib(device.total)} of {_gib(free)} GiB"
        return text

    def check(self) -> None:
        """Raises ResourceError with needed, free and the nearest plan that fits."""
        if self.fits:
            return
        remedy = "; nothing smaller fits: free some memory, or quantize to smaller formats"
        for smaller in _smaller(self.request, self.vram_free):
            plan = make_load_plan(smaller, self.ram_free, self.vram_free)
            if plan.fits:
                changed = _options(self.request, smaller)
                remedy = f"; nearest plan that fits: {changed} ({_gib(plan.ram.total)} GiB)"
                break
        raise ResourceError(f"not enough memory: {self.line()}{remedy}")


def make_load_plan(
    request: LoadRequest, ram_free: int | None = None, vram_free: tuple[int, ...] | None = None
) -> LoadPlan:
    """The plan of a request; what is free is asked of the system unless given."""
    return LoadPlan(
        request,
        request.host(),
        memory.available_bytes() if ram_free is None else ram_free,
        request.on_devices(),
        _vram_free(request.devices) if vram_free is None else vram_free,
    )


def _vram_free(devices: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(torch.cuda.mem_get_info(device)[0]) for device in devices)


def _smaller(request: LoadRequest, vram_free: tuple[int, ...]) -> Iterator[LoadRequest]:
    """Requests that take less, the least change first: no copies per node and as many experts on the GPUs as
    fit, then a shorter cache too."""
    numa = "shard" if request.numa == "replicate" else request.numa
    smaller = _fewer_hot(replace(request, numa=numa), vram_free)
    if smaller != request:
        yield smaller
    length = request.cache_len
    while length > SHORTEST_CACHE:
        length = max(SHORTEST_CACHE, length // 2)
        yield _fewer_hot(replace(request, numa=numa, cache_len=length), vram_free)


def _fewer_hot(request: LoadRequest, vram_free: tuple[int, ...]) -> LoadRequest:
    if not (request.hot_experts and request.expert_bytes):
        return request
    layers = request.config.moe_layers
    rest = replace(request, hot_experts=()).on_devices()
    most = most_hot_experts(rest, layers, request.expert_bytes, vram_free)
    if most >= max(count for _, count in request.hot_experts):
        return request
    return replace(request, hot_experts=tuple((layer, most) for layer in layers))


def _options(before: LoadRequest, after: LoadRequest) -> str:
    changed = [f"--numa {after.numa}"] if after.numa != before.numa else []
    if after.cache_len != before.cache_len:
        changed.append(f"--cache_lens {after.cache_len}")
    if after.hot_experts != before.hot_experts:
        changed.append(f"--gpu-experts {after.hot_experts[0][1]}")
    return " ".join(changed)


def _gib(count: int) -> str:
    return f"{count / GIB:.2f}"
