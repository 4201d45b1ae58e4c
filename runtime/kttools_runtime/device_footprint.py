"""What each GPU holds, by part, from sizes alone: the device half of footprint.py. Bytes.

The routed experts stay in RAM; the layers' other weights, the cache and the activations are spread over the
GPUs in runs of whole layers. What no size tells (context, graph) is an allowance and says so.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from .block_formats import BLOCK_FORMATS
from .config import ModelConfig
from .footprint import EMBEDDING, StoredTensor
from .model import DEFAULT_CHUNK_SIZE

# Allowances, not measurements: a CUDA context with torch's kernels and cuBLAS workspaces takes 0.3 to 0.6 GiB
# by driver and card; a captured decode step about 64 KiB for each of some 20 kernels of a layer.
CONTEXT_BYTES = 640 << 20
GRAPH_LAYER_BYTES = 20 * (64 << 10)
# Keys and values that prefill expands at once, as on the CPU.
HEAD_BLOCK_BYTES = 256 << 20
# Of a quantised matrix that a chunk of prompt has expanded to bf16 at a time (the largest of DeepSeek-V3's
# attention is 470 MB), and how much more its codes on the way take.
EXPANDED_BYTES = 64 << 20
EXPANSION = 2
# Experts of a prompt that are streamed: one computed, one on its way (hybrid/feed.py).
FED_EXPERTS = 2
# int4 on the GPU: scale and zero of a group as bf16, where the shards have a byte each.
INT4_GROUP_FACTOR = 2
# Looked up by row: one row goes down with the ids, 14 KiB for DeepSeek-V3, and 1.7 GiB stay out of VRAM.
IS_EMBEDDING_ON_DEVICE = False


@dataclass(frozen=True, slots=True)
class DeviceFootprint:
    """One GPU. layers: [first, last); weights: by stored format ("float32": norms and routers).

    workspace: activations of a chunk of the prompt, what is expanded and streamed for it; hot_experts: routed
    experts held here besides.
    """

    layers: tuple[int, int]
    weights: dict[str, int]
    cache: int
    workspace: int
    graph: int
    context: int = CONTEXT_BYTES
    hot_experts: int = 0

    @property
    def weight_bytes(self) -> int:
        return sum(self.weights.values())

    @property
    def total(self) -> int:
        parts = (self.weight_bytes, self.cache, self.workspace, self.graph, self.context, self.hot_experts)
        return sum(parts)


@dataclass(slots=True)
class _Block:
    """One layer, or what comes before or behind them (head, last norm)."""

    weights: dict[str, int] = field(default_factory=dict)

    def add(self, kind: str, count: int) -> None:
        self.weights[kind] = self.weights.get(kind, 0) + count


def device_footprints(
    config: ModelConfig,
    tensors: Iterable[StoredTensor],
    cache_len: int,
    count: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    expert_bytes: int = 0,
) -> tuple[DeviceFootprint, ...]:
    """`count` GPUs, layers in order, each with about the same bytes; the last one has the head too.

    expert_bytes: of a pack's expert, which prompts stream to the GPU; 0: they do not.
    """
    held = list(tensors)
    layers = config.num_hidden_layers
    blocks = [_Block() for _ in range(layers + 1)]
    for tensor in held:
        place = _block_of(tensor.name, config)
        if place is not None:
            kind, size = device_bytes(tensor, dtype)
            blocks[place].add(kind, size)
    cache = cache_len * config.cache_width * dtype.itemsize
    graph = GRAPH_LAYER_BYTES
    sizes = [
        sum(block.weights.values()) + (cache + graph if i < layers else 0) for i, block in enumerate(blocks)
    ]
    work = workspace_bytes(config, held, cache_len, dtype, chunk_size, expert_bytes)
    found = []
    for first, last in _runs(sizes, count):
        total: dict[str, int] = {}
        for block in blocks[first : last + (last == layers)]:
            for kind, size in block.weights.items():
                total[kind] = total.get(kind, 0) + size
        span = last - first
        found.append(DeviceFootprint((first, last), total, span * cache, work, span * graph))
    return tuple(found)


def device_bytes(tensor: StoredTensor, dtype: torch.dtype = torch.bfloat16) -> tuple[str, int]:
    """(kind, bytes) of one tensor on a GPU; kind: bf16, int8, int4 or float32."""
    wide = "float32" if dtype == torch.float32 else "bf16"
    if tensor.name == EMBEDDING or tensor.name.endswith(".kv_b_proj.weight"):
        return wide, dtype.itemsize * tensor.elements
    if tensor.format is None:
        return "float32", 4 * tensor.elements
    if dtype == torch.float32 or tensor.format == "bf16":
        return wide, dtype.itemsize * tensor.elements
    rows = tensor.shape[0]
    if tensor.format == "int8" or tensor.format in BLOCK_FORMATS:  # hybrid/linears.py: blocks become int8
        return "int8", tensor.elements + 4 * rows
    codes = tensor.elements // 2
    return "int4", codes + INT4_GROUP_FACTOR * (tensor.bytes - codes - 4 * rows) + 4 * rows


def kept_blocks_bytes(tensors: Iterable[StoredTensor]) -> int:
    """What linears in GGUF's blocks take on a GPU."""
    kept = (t for t in tensors if t.format in BLOCK_FORMATS and t.name != EMBEDDING)
    return sum(device_bytes(tensor)[1] for tensor in kept)


def workspace_bytes(
    config: ModelConfig,
    tensors: Iterable[StoredTensor],
    cache_len: int,
    dtype: torch.dtype = torch.bfloat16,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    expert_bytes: int = 0,
) -> int:
    """An estimate: a chunk of the prompt in the fullest layer, with matrices expanded to dtype some rows at a
    time, or with experts streamed. expert_bytes: of one expert in its pack; 0: none is streamed."""
    chunk, item, heads = min(chunk_size, cache_len), dtype.itemsize, config.num_attention_heads
    matrices = [t.elements for t in tensors if t.format not in (None, "bf16") and ".layers." in t.name]
    expanded = EXPANSION * min(item * max(matrices, default=0), EXPANDED_BYTES)
    stream = 3 * 4 * chunk * config.hidden_size
    keys = 2 * item * cache_len * heads * max(config.qk_head_dim, config.v_head_dim)
    attended = (4 + item) * chunk * heads * (config.qk_head_dim + config.v_head_dim)
    inner = max(config.intermediate_size, config.shared_intermediate_size)
    dense = expanded + max(attended + min(keys, HEAD_BLOCK_BYTES), 3 * 4 * chunk * inner)
    return stream + max(dense, _streamed_bytes(config, item, chunk, expert_bytes))


def _streamed_bytes(config: ModelConfig, item: int, chunk: int, expert_bytes: int) -> int:
    """Two places, the codes of one expert in order, half of it expanded, and rows if all tokens choose it."""
    if not expert_bytes:
        return 0
    hidden, inner = config.hidden_size, config.moe_intermediate_size
    expanded = EXPANSION * item * 2 * inner * hidden
    rows = chunk * ((4 + item) * (hidden + 2 * inner) + 3 * 4 * hidden)
    return (FED_EXPERTS + 1) * expert_bytes + expanded + rows


def with_hot_experts(
    devices: Sequence[DeviceFootprint], counts: Mapping[int, int], expert_bytes: int
) -> tuple[DeviceFootprint, ...]:
    """The same with so many hot experts of each layer, on the layer's GPU."""
    return tuple(
        replace(device, hot_experts=expert_bytes * sum(n for i, n in counts.items() if _has(device, i)))
        for device in devices
    )


def most_hot_experts(
    devices: Sequence[DeviceFootprint], moe_layers: Sequence[int], expert_bytes: int, free: Sequence[int]
) -> int:
    """How many experts of every MoE layer fit beside the rest. free: bytes of each GPU."""
    counts = []
    for device, limit in zip(devices, free, strict=True):
        layers = sum(_has(device, layer) for layer in moe_layers)
        if layers:
            counts.append(max(0, limit - device.total) // (layers * expert_bytes))
    return min(counts, default=0)


def hot_rooms(
    devices: Sequence[DeviceFootprint],
    moe_layers: Sequence[int],
    expert_bytes: int,
    num_experts: int,
    free: Sequence[int],
) -> tuple[int, ...]:
    """How many experts each GPU takes until it is full, of all its MoE layers together; at most all."""
    rooms = []
    for device, limit in zip(devices, free, strict=True):
        layers = sum(_has(device, layer) for layer in moe_layers)
        fitting = max(0, limit - device.total) // expert_bytes if expert_bytes else 0
        rooms.append(min(fitting, layers * num_experts))
    return tuple(rooms)


def _has(device: DeviceFootprint, layer: int) -> bool:
    return device.layers[0] <= layer < device.layers[1]


def _block_of(name: str, config: ModelConfig) -> int | None:
    """Index of the block a tensor belongs to; None: it stays in RAM."""
    parts = name.split(".")
    if parts[:2] == ["model", "layers"]:
        return int(parts[2])
    if name == EMBEDDING and not config.tie_word_embeddings:
        return 0 if IS_EMBEDDING_ON_DEVICE else None
    return config.num_hidden_layers


def _runs(sizes: list[int], count: int) -> list[tuple[int, int]]:
    """Layers [first, last) of each GPU, cut where the sum passes an even share. sizes: layers, then head."""
    layers, first = len(sizes) - 1, 0
    runs: list[tuple[int, int]] = []
    before, total = 0, sum(sizes)
    for index in range(layers):
        before += sizes[index]
        left = count - len(runs) - 1
        is_full = before >= total * (len(runs) + 1) / count - sizes[index] / 2
        if left and is_full and layers - index - 1 >= left:
            runs.append((first, index + 1))
            first = index + 1
    runs.append((first, layers))
    return runs
