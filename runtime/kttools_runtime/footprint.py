"""What a model takes in memory, from sizes alone: RAM by part, and of each GPU by part. Bytes.

One accounting for `kttools plan`, for the check before every load and for whoever places weights: the numbers
follow the code they name, and tests hold them against processes.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

import torch

from . import _kernels, attention, gqa
from .block_formats import BLOCK_FORMATS, BLOCKS_PART
from .cache import KVCache
from .config import ModelConfig
from .embedding import EMBEDDING
from .model import DEFAULT_CHUNK_SIZE
from .numa import NumaPlan
from .safetensors_file import TensorInfo
from .weights import PARTS

STRIP_ROWS = 32  # the kernels pad a matrix to whole strips (csrc/kernels.h, kStripCols)
STEP_INPUTS = {"bf16": 32, "int8": 64, "int4": 64, "q8_0": 64}  # and its inputs to whole steps
# Measured (torch 2.13 for CPUs, x86-64): what an interpreter with torch and this package takes beyond its own
# resident memory once a model has run, code paged in on first use and the engine's threads: 6 to 20 MB, less
# the more had been imported.
WARM_BYTES = 8_000_000
# tokenizer.json in memory: 13 MB for 0.54 MB of it, 8 of them the library.
TOKENIZER_BYTES, TOKENIZER_FACTOR = 8_000_000, 10
# What malloc keeps of small activations beside those in use: as much again (ds3-nano and ds3-tiny, 100 to
# 4000 tokens), but larger blocks are mapped and go back to the system.
KEPT_BYTES = 64 << 20
ENGINE_TOKENS = 4096  # the engine's passes (csrc/moe.cpp)
ENGINE_GROUP_ROWS = 1280
ENGINE_THREAD_BYTES = 3 << 19  # C of a run of strips, with room for huge pages


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of the shards. name: with ".weight"; format: as the manifest lists it, None: no linear.

    bytes: as stored, scales included.
    """

    name: str
    shape: tuple[int, ...]
    format: str | None
    bytes: int

    @property
    def elements(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class Footprint:
    """RAM of a loaded model. experts: mapped packs, page cache; numa: how they are shared and copied.

    dense: of the shards as computed with; cache: full; scratch: an estimate; process: interpreter, libraries
    and tokenizer beyond what this process holds already (see resident).
    """

    experts: int
    numa: NumaPlan
    dense: int
    cache: int
    scratch: int
    process: int

    @property
    def copies(self) -> int:
        """Expert weights held beside the mapped packs (numa replicate)."""
        return self.numa.copied_bytes

    @property
    def anonymous(self) -> int:
        """Everything but the page cache."""
        return self.copies + self.dense + self.cache + self.scratch + self.process

    @property
    def total(self) -> int:
        return self.experts + self.anonymous

    def node_bytes(self) -> tuple[int, ...]:
        """Per memory node in use: its experts, an even share of the dense weights (they are interleaved), and
        on the first node the rest."""
        nodes = len(self.numa.node_bytes)
        shares = [held + self.dense // nodes for held in self.numa.node_bytes]
        if self.copies:  # the mapped originals, page cache of no certain node
            shares = [share + self.experts // nodes for share in shares]
        shares[0] += self.total - sum(shares)
        return tuple(shares)


def footprint(
    config: ModelConfig,
    tensors: Iterable[StoredTensor],
    experts: int,
    numa: NumaPlan,
    cache_len: int,
    dtype: torch.dtype = torch.bfloat16,
    threads: int = 1,
    tokenizer: int = 0,
    is_streamed: bool = False,
) -> Footprint:
    """RAM of load() on the CPU and a full cache. experts: bytes of all packs; tokenizer: of its files.

    is_streamed: one layer at a time is held; the packs' pages come and go.
    """
    held = list(tensors)
    dense = sum(held_bytes(tensor, config, dtype) for tensor in held)
    if is_streamed:
        dense = _largest_layer(held, config, dtype)
        experts //= max(1, len(config.moe_layers))
    return Footprint(
        experts=experts,
        numa=numa,
        dense=dense,
        cache=cache_len * cache_bytes_per_token(config, dtype),
        scratch=scratch_bytes(config, held, cache_len, dtype, threads),
        process=WARM_BYTES + TOKENIZER_BYTES + TOKENIZER_FACTOR * tokenizer,
    )


def stored_tensors(infos: Mapping[str, TensorInfo], linears: Mapping[str, str]) -> list[StoredTensor]:
    """The tensors of a bundle's shards. infos: by stored name; linears: base name -> format (manifest)."""
    suffixes = {f".{part}" for parts in PARTS.values() for part in parts}
    found = []
    for name, info in infos.items():
        base, dot, part = name.rpartition(".")
        form = linears.get(base)
        if form is None or dot + part not in suffixes:
            found.append(StoredTensor(name, tuple(info.shape), None, info.bytes))
        elif part in ("weight", "qweight", BLOCKS_PART):
            parts = [infos[f"{base}.{p}"] for p in _parts(form) if f"{base}.{p}" in infos]
            rows, columns = (*info.shape, 1, 1)[:2]
            if form in BLOCK_FORMATS:
                columns = BLOCK_FORMATS[form].in_features(columns)
            shape = (rows, 2 * columns if form == "int4" else columns)
            found.append(StoredTensor(f"{base}.weight", shape, form, sum(i.bytes for i in parts)))
    return found


def cache_bytes_per_token(config: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> int:
    """All layers."""
    return KVCache(config, 1, dtype, torch.device("meta")).bytes_per_token


def held_bytes(tensor: StoredTensor, config: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> int:
    """One tensor in RAM on device cpu (linear.py, attention.py, model.py)."""
    is_float32 = dtype == torch.float32
    if tensor.name == EMBEDDING:
        return dtype.itemsize * tensor.elements if config.tie_word_embeddings else tensor.bytes
    if tensor.format is None:
        # The router's native form keeps bf16 beside float32 (csrc/router.h).
        is_router = tensor.name.endswith(".gate.weight")
        return (6 if is_router and not is_float32 else 4) * tensor.elements
    if tensor.name.endswith(".kv_b_proj.weight") or is_float32:
        return dtype.itemsize * tensor.elements
    return packed_bytes(tensor)


def packed_bytes(tensor: StoredTensor) -> int:
    """A linear in the strips of the CPU kernels (PackedLinear.nbytes): its stored bytes, padded."""
    rows, columns = tensor.shape
    form = tensor.format or "bf16"
    strips = -(-rows // STRIP_ROWS)
    block = BLOCK_FORMATS.get(form)
    step = STEP_INPUTS.get(form) or (block.inputs if block else 1)
    inputs = -(-columns // step) * step
    if form == "bf16":
        return strips * STRIP_ROWS * inputs * 2
    if form == "int8":
        return strips * STRIP_ROWS * (inputs + 4)
    if block:
        return strips * STRIP_ROWS * ((block.row_bytes(inputs) or 0) + 4)
    per_row = (tensor.bytes - 4 * rows) // max(rows, 1)  # codes, scales and zeros of a row as stored
    return strips * STRIP_ROWS * (per_row * inputs // max(columns, 1) + 4)


def scratch_bytes(
    config: ModelConfig, tensors: Iterable[StoredTensor], cache_len: int, dtype: torch.dtype, threads: int
) -> int:
    """An estimate: a chunk of the prompt at the end of a full cache, or the largest matrix while repacked.

    The engine's buffers stay; of torch's a share that malloc keeps.
    """
    largest = max((tensor.bytes for tensor in tensors if tensor.format), default=0)
    chunk = min(DEFAULT_CHUNK_SIZE, cache_len)
    if is_native(config, dtype):
        active = _step_bytes(config, chunk, cache_len, threads)
    else:
        active = _activation_bytes(config, chunk, cache_len, dtype)
        active += min(active, KEPT_BYTES)
    return max(largest, active) + _engine_bytes(config, chunk, threads)


def is_native(config: ModelConfig, dtype: torch.dtype) -> bool:
    """Whether a prompt goes through the kernels' own halves of a layer (csrc/latent_prefill.h) here."""
    sizes = (config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim, config.kv_lora_rank)
    is_fitting = config.attention == "mla" and all(size % 32 == 0 for size in sizes)
    return is_fitting and dtype == torch.bfloat16 and "amx" in _kernels.available_isas()


def _step_bytes(config: ModelConfig, chunk: int, cache_len: int, threads: int) -> int:
    """The step's buffers (csrc/engine.h, StepScratch), which stay, and the latents in tiles; a third on top
    for what surrounds them (measured: ds3-nano and ds3-tiny, 256 to 4000 tokens)."""
    heads, hidden = config.num_attention_heads, config.hidden_size
    inner = max(config.intermediate_size, config.shared_intermediate_size)
    projected = max(heads * config.qk_head_dim + config.cache_width, 2 * inner)
    rows = (
        4 * chunk * (4 * hidden + projected + max(inner, config.q_lora_rank or 0) + heads * config.v_head_dim)
    )
    tiles = 2 * 2 * cache_len * config.cache_width
    return (rows + tiles + threads * 8 * chunk * config.cache_width) * 4 // 3


def _activation_bytes(config: ModelConfig, chunk: int, cache_len: int, dtype: torch.dtype) -> int:
    """torch's tensors at the fullest place of a layer; the residual stream is float32."""
    heads, item = config.num_attention_heads, dtype.itemsize
    stream = 3 * 4 * chunk * config.hidden_size
    is_mla = config.attention == "mla"
    width = max(config.qk_head_dim, config.v_head_dim)
    # Keys and values of a block of heads, and the layout torch's kernel makes of them for every query head.
    context = 2 * cache_len * heads * width * item
    context = min(context, attention.HEAD_BLOCK_BYTES if is_mla else gqa.HEAD_BLOCK_BYTES)
    expanded = context * (config.qk_nope_head_dim + config.v_head_dim) // (2 * width) if is_mla else 0
    mask = item * min(chunk, attention.QUERY_BLOCK_TOKENS) * cache_len if cache_len > chunk else 0
    copies = context if is_mla and item == 2 else 0
    queries = chunk * heads * (4 * config.qk_head_dim + item * width + 4 * config.v_head_dim)
    latents = 4 * chunk * (config.cache_width + (config.q_lora_rank or 0))
    attended = context + copies + expanded + mask + queries + latents
    is_dense = len(config.moe_layers) < config.num_hidden_layers
    inner = max(config.intermediate_size if is_dense else 0, config.shared_intermediate_size)
    routed = chunk * (4 * 4 * config.n_routed_experts + (4 + item) * config.hidden_size)
    return stream + max(attended, 3 * 4 * chunk * inner + routed)


def _engine_bytes(config: ModelConfig, chunk: int, threads: int) -> int:
    """Buffers of the engine (csrc/engine.h): staged rows, one group of experts, C of every thread."""
    tokens = min(chunk, ENGINE_TOKENS)
    rows = min(ENGINE_GROUP_ROWS, tokens * config.num_experts_per_tok)
    inner = config.moe_intermediate_size
    staged = 2 * tokens * max(config.hidden_size, config.num_attention_heads * config.v_head_dim)
    group = 2 * rows * config.hidden_size + (4 + 2) * rows * inner
    plan = 40 * tokens * config.num_experts_per_tok
    return staged + group + plan + threads * (ENGINE_THREAD_BYTES + 64 * max(config.hidden_size, inner))


def _largest_layer(tensors: list[StoredTensor], config: ModelConfig, dtype: torch.dtype) -> int:
    """Streamed: what is no layer, and the largest layer."""
    layers: dict[str, int] = {}
    for tensor in tensors:
        parts = tensor.name.split(".")
        key = parts[2] if parts[:2] == ["model", "layers"] else ""
        layers[key] = layers.get(key, 0) + held_bytes(tensor, config, dtype)
    return layers.pop("", 0) + max(layers.values(), default=0)


def _parts(form: str) -> tuple[str, ...]:
    return PARTS["float" if form == "bf16" else form]
