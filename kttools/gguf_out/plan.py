"""What will be written where, from shapes alone: tensors, their types, and the files with their headers."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from kttools.checkpoint.gguf.architectures import ARCHITECTURES, Architecture, Transform
from kttools.checkpoint.gguf.architectures.base import model_keys
from kttools.checkpoint.gguf.types import BY_NAME, GgmlType
from kttools.checkpoint.gguf.vocabulary import END_IDS, PREFIX
from kttools.families import Role, SourceModel, TensorSource
from kttools.families.layouts import experts_prefix
from kttools_runtime.config import ModelConfig
from kttools_runtime.errors import UnsupportedModelError, UsageError
from kttools_runtime.strict_json import read_bounded

from .pairs import Typed, head_bytes, padding, pair_bytes, tensor_bytes, typed
from .vocabulary import vocabulary_pairs

# --type -> (ggml type, general.file_type, type of embedding and head)
FILE_TYPES: dict[str, tuple[str, int, str]] = {
    "f32": ("F32", 0, "F32"),
    "f16": ("F16", 1, "F16"),
    "bf16": ("BF16", 32, "BF16"),
    "q8_0": ("Q8_0", 7, "Q8_0"),
    "q5_1": ("Q5_1", 9, "Q8_0"),
    "q5_0": ("Q5_0", 8, "Q8_0"),
    "q4_1": ("Q4_1", 3, "Q8_0"),
    "q4_0": ("Q4_0", 2, "Q8_0"),
}
# attn_k_b and attn_v_b are multiplied per head, which llama.cpp's AMX build does with bf16 and f32 alone
# (it stops at an assertion, with its own files too); in bf16 they are 0.3 % of DeepSeek-V3.
KV_B_TYPES = {"f32": "F32"}
FALLBACK = "F16"  # where rows do not fill whole blocks
WIDE_ROLES = (Role.NORM, Role.ROUTER, Role.ROUTER_BIAS, Role.ATTENTION_BIAS, Role.EXPERT_BIAS)
OUTER_ROLES = (Role.EMBEDDING, Role.HEAD)
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
MAX_TOKENIZER_FILE_BYTES = 1 << 30
KV_B = ".self_attn.kv_b_proj.weight"


@dataclass(frozen=True, slots=True)
class OutTensor:
    """One tensor of the result. shape: slowest dimension first."""

    name: str
    kind: GgmlType
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        return self.kind.row_bytes(self.shape[-1]) or 0

    @property
    def bytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.row_bytes


@dataclass(frozen=True, slots=True)
class Job:
    """A source tensor and what is written of it. arrange: makes the outputs' matrices of all its rows."""

    source: TensorSource
    outputs: tuple[OutTensor, ...]
    arrange: Callable[[torch.Tensor], tuple[torch.Tensor, ...]] | None = None


@dataclass(frozen=True, slots=True)
class OutFile:
    """One file: its header up to the data, and the absolute offset of every tensor."""

    path: Path
    header: bytes
    offsets: dict[str, int]
    bytes: int


@dataclass(frozen=True, slots=True)
class OutPlan:
    """Everything convert will write."""

    source: SourceModel
    type: str
    jobs: tuple[Job, ...]
    experts: dict[int, tuple[OutTensor, OutTensor, OutTensor]]
    files: tuple[OutFile, ...]

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)

    @property
    def tensors(self) -> int:
        return sum(len(file.offsets) for file in self.files)


def make_plan(
    source: SourceModel, target: Path, type_name: str, split_max_bytes: int | None = None
) -> OutPlan:
    """Raises UnsupportedModelError (GGUF or we cannot say it) or UsageError (type)."""
    if type_name not in FILE_TYPES:
        raise UsageError(f"unknown type {type_name!r}: expected one of {', '.join(FILE_TYPES)}")
    architecture = _architecture_for(source.config)
    pairs = _pairs(source, architecture, type_name, target)
    jobs = tuple(_job(tensor, source.config, architecture, type_name) for tensor in source.tensors)
    experts = {layer: _experts(source, architecture, layer, type_name) for layer in source.moe_layers}
    tensors = [out for job in jobs for out in job.outputs] + [
        out for outs in experts.values() for out in outs
    ]
    return OutPlan(source, type_name, jobs, experts, _files(target, pairs, tensors, split_max_bytes))


def _architecture_for(model: ModelConfig) -> Architecture:
    """The one that holds the model; UnsupportedModelError says what the nearest one would need."""
    gaps = [(architecture, architecture.gaps(model)) for architecture in ARCHITECTURES]
    nearest, missing = min(gaps, key=lambda entry: len(entry[1]))
    if not missing:
        return nearest
    known = ", ".join(entry.name for entry in ARCHITECTURES)
    raise UnsupportedModelError(
        f"this model cannot be written as any GGUF architecture we know ({known}): "
        f"{nearest.name}, the nearest, needs {' and '.join(missing)}"
    )


def _job(tensor: TensorSource, model: ModelConfig, architecture: Architecture, type_name: str) -> Job:
    if tensor.name.endswith(KV_B):
        return _kv_b(tensor, model, type_name)
    name, transform = _named(architecture, tensor.name)
    out = OutTensor(name, _kind(type_name, tensor.role, tensor.shape), tensor.shape)
    if transform is Transform.NONE:
        return Job(tensor, (out,))
    if transform is Transform.ONE_ROW:
        return Job(tensor, (OutTensor(name, BY_NAME["F32"], tensor.shape[1:]),), _flat)
    heads = model.num_attention_heads if transform is Transform.QUERY_HALVES else model.num_key_value_heads
    return Job(tensor, (out,), _Interleave(heads))


def _flat(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (rows.reshape(1, -1),)


@dataclass(frozen=True, slots=True)
class _Interleave:
    """The two halves of each head's rows as neighbours."""

    heads: int

    def __call__(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        halves = rows.view(self.heads, 2, rows.shape[0] // self.heads // 2, *rows.shape[1:])
        return (halves.transpose(1, 2).reshape(rows.shape),)


@dataclass(frozen=True, slots=True)
class _SplitKvB:
    """kv_b_proj to attn_k_b (transposed per head) and attn_v_b."""

    heads: int
    nope: int

    def __call__(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        each = rows.view(self.heads, -1, rows.shape[-1])
        key = each[:, : self.nope].transpose(1, 2).contiguous()
        value = each[:, self.nope :].contiguous()
        return key.view(-1, self.nope), value.view(-1, rows.shape[-1])


def _kv_b(tensor: TensorSource, model: ModelConfig, type_name: str) -> Job:
    layer = tensor.name.split(".")[2]
    heads, rank, nope = model.num_attention_heads, model.kv_lora_rank, model.qk_nope_head_dim
    shapes = {"attn_k_b": (heads, rank, nope), "attn_v_b": (heads, model.v_head_dim, rank)}
    kind = BY_NAME[KV_B_TYPES.get(type_name, "BF16")]
    outputs = tuple(OutTensor(f"blk.{layer}.{name}.weight", kind, shape) for name, shape in shapes.items())
    return Job(tensor, outputs, _SplitKvB(heads, nope))


def _experts(
    source: SourceModel, architecture: Architecture, layer: int, type_name: str
) -> tuple[OutTensor, OutTensor, OutTensor]:
    model = source.config
    wide = (model.n_routed_experts, model.moe_intermediate_size, model.hidden_size)
    outs = []
    for projection, shape in zip(PROJECTIONS, (wide, wide, (wide[0], wide[2], wide[1])), strict=True):
        name, _ = _named(architecture, experts_prefix(layer) + projection)
        outs.append(OutTensor(name, _kind(type_name, Role.EXPERT, shape), shape))
    gate, up, down = outs
    return gate, up, down


def _named(architecture: Architecture, name: str) -> tuple[str, Transform]:
    found = architecture.gguf_name(name)
    if found is None:
        raise UnsupportedModelError(f"GGUF architecture {architecture.name} has no name for tensor {name}")
    return found


def _kind(type_name: str, role: Role, shape: tuple[int, ...]) -> GgmlType:
    """llama.cpp wants vectors, norms and the router in float32."""
    if role in WIDE_ROLES or len(shape) == 1:
        return BY_NAME["F32"]
    inner, _, outer = FILE_TYPES[type_name]
    kind = BY_NAME[outer if role in OUTER_ROLES else inner]
    return kind if kind.row_bytes(shape[-1]) is not None else BY_NAME[FALLBACK]


def _pairs(source: SourceModel, architecture: Architecture, type_name: str, target: Path) -> dict[str, Typed]:
    model = source.config
    where = str(source.path)
    values = model_keys(model, architecture.keys) | architecture.describe(model)
    values["vocab_size"] = model.vocab_size
    pairs = {
        "general.architecture": typed(architecture.name),
        "general.type": typed("model"),
        "general.name": typed(target.name.removesuffix(".gguf")),
        "general.quantization_version": typed(2),
        "general.file_type": typed(FILE_TYPES[type_name][1]),
    }
    pairs |= {f"{architecture.name}.{key}": typed(value) for key, value in values.items()}
    files = source.tokenizer_data | {
        name: read_bounded(file, MAX_TOKENIZER_FILE_BYTES) for name, file in source.tokenizer_files.items()
    }
    return pairs | _special_ids(model) | vocabulary_pairs(files, model.vocab_size, where)


def _special_ids(model: ModelConfig) -> dict[str, Typed]:
    """The config's own special ids, for a model without tokenizer and for a second end of answers."""
    ids = dict(zip(END_IDS, model.eos_token_ids, strict=False))
    if model.bos_token_id is not None:
        ids["bos_token_id"] = model.bos_token_id
    return {PREFIX + key: typed(value) for key, value in ids.items()}


def _files(
    target: Path, pairs: dict[str, Typed], tensors: list[OutTensor], split_max_bytes: int | None
) -> tuple[OutFile, ...]:
    groups: list[list[OutTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if split_max_bytes and groups[-1] and filled + tensor.bytes > split_max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.bytes
    if len(groups) == 1:
        return (_file(target, pairs, groups[0]),)
    stem = target.name.removesuffix(".gguf")
    files = []
    for number, group in enumerate(groups):
        split = {
            "split.no": Typed("u16", number),
            "split.count": Typed("u16", len(groups)),
            "split.tensors.count": Typed("i32", len(tensors)),
        }
        path = target.with_name(f"{stem}-{number + 1:05d}-of-{len(groups):05d}.gguf")
        files.append(_file(path, (pairs if number == 0 else {}) | split, group))
    return tuple(files)


def _file(path: Path, pairs: dict[str, Typed], tensors: list[OutTensor]) -> OutFile:
    relative: dict[str, int] = {}
    position = 0
    for tensor in tensors:
        relative[tensor.name] = position
        position += tensor.bytes + len(padding(tensor.bytes))
    table = b"".join(tensor_bytes(t.name, t.kind, t.shape, relative[t.name]) for t in tensors)
    header = head_bytes(len(tensors), len(pairs))
    header += b"".join(pair_bytes(key, value) for key, value in pairs.items()) + table
    header += padding(len(header))
    offsets = {name: len(header) + offset for name, offset in relative.items()}
    return OutFile(path, header, offsets, len(header) + position)
