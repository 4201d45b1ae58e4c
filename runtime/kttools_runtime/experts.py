"""The CPU expert engine seen from Python: threads, layers made from tensors or mapped from packs, forward."""

from pathlib import Path

import numpy as np
import torch

from . import _kernels, env
from .errors import EngineError, HardwareError, InvalidInputError, ResourceError, UsageError
from .numa import engine_mode
from .weights import check_sum_inputs

# What a user asks for, and the pack format it means. Layer errors: g32 0.13,
# g64 0.145, g128 0.16.
FORMAT_ALIASES = {"int4": "int4_g64"}


def available_isas() -> list[str]:
    """Names of the kernel tables this CPU runs, best first."""
    return list(_kernels.available_isas())


def pack_format(name: str) -> str:
    """The pack format for a user's format name ("bf16", "int8", "int4", ...). Raises UsageError."""
    resolved = FORMAT_ALIASES.get(name, name)
    if resolved not in _kernels.FORMATS and resolved not in _kernels.BLOCK_FORMATS:
        valid = ", ".join([*_kernels.FORMATS, *FORMAT_ALIASES, *_kernels.BLOCK_FORMATS])
        raise UsageError(f"unknown expert format {name!r}: expected one of {valid}")
    return resolved


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A contiguous CPU tensor as numpy without copying; bf16 as its uint16 bit patterns."""
    tensor = tensor.detach()
    if not tensor.is_contiguous():
        tensor = tensor.contiguous()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


class ExpertLayer:
    """The routed experts of one MoE layer. Made by ExpertEngine."""

    def __init__(self, layer: _kernels.ExpertLayer, hidden_size: int) -> None:
        self.native = layer
        self.hidden_size = hidden_size
        self.num_experts: int = layer.num_experts

    @property
    def node_bytes(self) -> list[int]:
        """Bytes of weights that each memory node multiplies (with replicate: holds)."""
        return list(self.native.node_bytes)

    def set_biases(self, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> None:
        """What is added to the matrices' outputs. gate, up: [E, I]; down: [E, H]; all float32."""
        try:
            self.native.set_biases(as_numpy(gate), as_numpy(up), as_numpy(down))
        except ValueError as error:
            raise InvalidInputError(f"expert biases: {error}") from None

    def set_swiglu(self, alpha: float, limit: float) -> None:
        """From now on g * sigmoid(alpha g) * (u + 1), g = min(gate, limit) and u = up within +-limit."""
        self.native.set_gate(alpha, limit, 1.0)

    def make_resident(self, expert: int) -> None:
        """Bring an expert's weights into memory, each node's from a thread of that node; on one node beside
        whatever the engine computes."""
        self.native.make_resident(expert)

    def forward(
        self,
        x: torch.Tensor,
        expert_ids: torch.Tensor,
        expert_weights: torch.Tensor,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Weighted sum of each token's experts.

        x: [T, hidden_size] bf16 or f32; expert_ids: [T, k] int64, -1 = none (x rows and weights of -1 are
        never read); expert_weights: [T, k] f32. Returns [T, hidden_size] f32 (in `out` when given).
        Raises InvalidInputError for ids out of range or wrong shapes and dtypes, EngineError in a forked
        process.
        """
        if out is None:
            out = torch.empty((x.shape[0], self.hidden_size), dtype=torch.float32)
        try:
            self.native.forward(as_numpy(x), as_numpy(expert_ids), as_numpy(expert_weights), out.numpy())
        except ValueError as error:
            raise InvalidInputError(f"expert layer: {error}") from None
        except RuntimeError as error:
            raise EngineError(f"expert layer: {error}") from None
        return out


class ExpertEngine:
    """Threads and kernels that every expert layer and packed matrix of a model shares.

    threads: workers, the caller included; None: KTTOOLS_CPU_INFER or every CPU of this process.
    isa: name of a kernel table; None: KTTOOLS_ISA or the best. numa: "shard" (each memory node's workers take
    their strips of every expert), "replicate" (each node has a copy), "off", or "auto": shard where there are
    several nodes. simulated_nodes: pretend so many. Raises HardwareError, listing what runs here, and
    ResourceError if the system does not start that many threads. A forked process must make its own.
    """

    def __init__(
        self,
        threads: int | None = None,
        isa: str | None = None,
        numa: str = "off",
        simulated_nodes: int = 0,
    ) -> None:
        threads = env.default_threads() if threads is None else threads
        if not 1 <= threads <= 1024:
            raise UsageError(f"threads must be 1 to 1024, got {threads}")
        mode = engine_mode(numa)
        try:
            self.native = _kernels.Engine(threads, isa or env.forced_isa(), mode, simulated_nodes)
        except ValueError as error:
            raise HardwareError(str(error)) from None
        except RuntimeError as error:
            raise ResourceError(str(error)) from None

    @property
    def threads(self) -> int:
        """Number of workers, the caller included."""
        return int(self.native.threads)

    @property
    def nodes(self) -> int:
        """Number of memory nodes that work is split over; 1 with numa off."""
        return int(self.native.nodes)

    @property
    def isa(self) -> str:
        """Name of the kernel table in use."""
        return str(self.native.isa)

    def layer_from_tensors(
        self, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, format: str = "int8"
    ) -> ExpertLayer:
        """Quantise and tile experts in memory. gate, up: [E, I, H]; down: [E, H, I]; bf16 or f32."""
        num_experts, intermediate, hidden = gate.shape
        name = pack_format(format)
        if name not in _kernels.FORMATS:
            raise UsageError(f"{name} holds the blocks of a GGUF file; tensors cannot be quantised to it")
        size = _kernels.expert_bytes(name, hidden, intermediate)
        blobs = []
        for expert in range(num_experts):
            blob = aligned_bytes(size)
            _kernels.pack_expert(
                name, as_numpy(gate[expert]), as_numpy(up[expert]), as_numpy(down[expert]), blob
            )
            blobs.append(blob)
        return self.layer_from_blobs(hidden, intermediate, [name] * num_experts, blobs)

    def layer_from_pack(self, path: str | Path) -> ExpertLayer:
        """Map a .ktpack file and use it in place. Raises PackFormatError."""
        from .pack import map_pack

        header, blobs = map_pack(Path(path))
        sizes = header.hidden_size, header.moe_intermediate_size
        return self.layer_from_blobs(*sizes, list(header.formats), blobs)

    def layer_from_blobs(
        self, hidden_size: int, moe_intermediate_size: int, formats: list[str], blobs: list[np.ndarray]
    ) -> ExpertLayer:
        """A layer over blobs in memory, one per expert, used in place and kept alive.

        Raises InvalidInputError for sizes that a format's sums cannot hold.
        """
        for name in set(formats):
            check_sum_inputs("expert layer", name, max(hidden_size, moe_intermediate_size))
        layer = _kernels.ExpertLayer(self.native, hidden_size, moe_intermediate_size, formats, blobs)
        return ExpertLayer(layer, hidden_size)


def aligned_bytes(size: int, alignment: int = 4096) -> np.ndarray:
    """An uninitialised uint8 array whose first byte lies on a multiple of `alignment`."""
    raw = np.empty(size + alignment, dtype=np.uint8)
    start = -raw.ctypes.data % alignment
    return raw[start : start + size]
