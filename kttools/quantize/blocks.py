"""Matrices of a GGUF file kept in its own blocks: the formats they become, and the way there."""

from collections.abc import Callable
from dataclasses import dataclass

import gguf
import numpy as np

from kttools.checkpoint.gguf import GgufWeights
from kttools.families import SourceModel, TensorSource
from kttools_runtime import _kernels
from kttools_runtime.block_formats import BLOCK_FORMATS, first_bad_scale
from kttools_runtime.errors import InvalidInputError, KTError

from .recipe import DEFAULT_CPU_FORMAT, DEFAULT_GPU_FORMAT
from .rules import KEPT_FORMAT

PROJECTIONS = ("gate", "up", "down")
# ggml type -> the pack format that holds exactly its numbers. WIDENED are a float16 scale for 32 small
# integers, which Q8_0 is too: the same numbers in more bytes. llama.cpp falls back to Q5_0 and Q8_0 for rows
# that are no multiple of 256.
KEPT = {"Q4_K": "q4_k", "Q5_K": "q5_k", "Q6_K": "q6_k", "Q8_0": "q8_0"}
WIDENED = {"Q4_0": "q8_0", "Q5_0": "q8_0", "IQ4_NL": "q8_0"}
BELOW_INT8 = ("Q4_K", "Q5_K", "Q6_K")
# Linears beside kept ones that have no blocks we keep: what the file has in floats, or in parts that are put
# together (attn_k_b and attn_v_b), stays bf16; of other quantised types int8 is the nearest.
FLOAT_KINDS = ("F32", "F16", "BF16")
WITHOUT_BLOCKS, OTHER_BLOCKS = "bf16", "int8"
SCALE_BYTES = 2


@dataclass(frozen=True, slots=True)
class Blocks:
    """One expert matrix. format: of the pack; data: uint8, ggml's rows in that format."""

    format: str
    data: np.ndarray


def stored_kinds(source: SourceModel) -> set[str]:
    """The types that the source's expert matrices are stored in, in its own words."""
    names = {
        name
        for layer in source.moe_layers
        for expert in range(source.config.n_routed_experts)
        for name, _ in source.expert_names(layer, expert)
    }
    return {source.checkpoint.stored(name).dtype for name in names}


def default_cpu_format(source: SourceModel) -> str:
    """KEPT_FORMAT where all blocks can be kept and some are smaller than int8 would be; else int8.

    Q8_0 alone becomes int8: as large, a scale for a row instead of 32 weights, and faster for long prompts.
    """
    if not source.moe_layers or not isinstance(source.checkpoint, GgufWeights):
        return DEFAULT_CPU_FORMAT
    kinds = stored_kinds(source)
    is_kept = kinds <= {*KEPT, *WIDENED} and any(kind in BELOW_INT8 for kind in kinds)
    return KEPT_FORMAT if is_kept else DEFAULT_CPU_FORMAT


def default_gpu_format(source: SourceModel) -> str:
    """KEPT_FORMAT where a linear is stored in blocks smaller than int8 would be; else the usual one."""
    if not isinstance(source.checkpoint, GgufWeights):
        return DEFAULT_GPU_FORMAT
    kinds = [_matrix_kind(tensor) for tensor in source.tensors if tensor.role.is_linear]
    return KEPT_FORMAT if any(kind in BELOW_INT8 for kind in kinds) else DEFAULT_GPU_FORMAT


def linear_format(source: TensorSource, is_ruled: bool) -> str | None:
    """The format that keeps a matrix's numbers; where none does WITHOUT_BLOCKS or OTHER_BLOCKS for a linear,
    None (as the source has it) for the embedding.

    is_ruled: a recipe's line asks for it; then InvalidInputError is raised instead.
    """
    kind = _matrix_kind(source)
    found = KEPT.get(kind or "") or WIDENED.get(kind or "")
    if found is not None and BLOCK_FORMATS[found].row_bytes(source.shape[-1]) is not None:
        return found
    if not source.role.is_linear:
        return None
    if is_ruled:
        stored = source.checkpoint.stored(source.info.name).dtype
        raise InvalidInputError(
            f"{source.file}: tensor {source.name} is {stored}; {KEPT_FORMAT} keeps the blocks of a GGUF file "
            f"({', '.join([*KEPT, *WIDENED])}); choose bf16, int8 or int4"
        )
    return WITHOUT_BLOCKS if kind is None or kind in FLOAT_KINDS else OTHER_BLOCKS


def _matrix_kind(source: TensorSource) -> str | None:
    checkpoint = source.checkpoint
    kind = checkpoint.matrix_kind(source.info.name) if isinstance(checkpoint, GgufWeights) else None
    return kind.name if kind else None


def linear_rows(source: TensorSource, begin: int, end: int) -> np.ndarray:
    """uint8 [end - begin, bytes]: rows of a linear that has a linear_format, in that format.

    Raises InvalidInputError for a scale that is not finite.
    """
    checkpoint = source.checkpoint
    assert isinstance(checkpoint, GgufWeights)
    kind = checkpoint.matrix_kind(source.info.name)
    assert kind is not None
    rows = checkpoint.raw_matrix(source.info.name, begin, end)
    if kind.name in WIDENED:
        rows = widened(kind.name, rows.reshape(-1, kind.bytes)).reshape(end - begin, -1)
    bad = first_bad_scale({**KEPT, **WIDENED}[kind.name], rows)
    if bad:
        raise InvalidInputError(
            f"{source.file}: tensor {source.name}: the scale of the block at {[begin + bad[0], bad[1]]} is "
            "not a finite number; the checkpoint is damaged, fetch it again"
        )
    return rows


def kept_format(source: SourceModel, layer: int, expert: int) -> str:
    """The pack format that keeps this expert as it is stored, such as q4_k_q6_k.

    Raises InvalidInputError for a source without blocks, or with blocks that no pack holds.
    """
    gate, up, down = (_format_of(source, *place) for place in source.expert_names(layer, expert))
    if gate != up:
        raise InvalidInputError(
            f"{source.path}: layer {layer}, expert {expert}: gate is {gate} and up {up}, but "
            f"{KEPT_FORMAT} packs hold both side by side in one format; choose --cpu-format int8"
        )
    return gate if gate == down else f"{gate}_{down}"


def _format_of(source: SourceModel, name: str, index: int | None) -> str:
    kind = source.checkpoint.stored(name).dtype
    found = KEPT.get(kind) or WIDENED.get(kind)
    if found is None or not isinstance(source.checkpoint, GgufWeights):
        known = ", ".join([*KEPT, *WIDENED])
        raise InvalidInputError(
            f"{source.path}: tensor {name} is {kind}; --cpu-format {KEPT_FORMAT} keeps the blocks of a GGUF "
            f"file ({known}); choose int8 or int4"
        )
    return found


def read_blocks(source: SourceModel, layer: int, expert: int) -> tuple[Blocks, Blocks, Blocks]:
    """gate, up, down of one expert. Raises InvalidInputError as kept_format does."""
    kept_format(source, layer, expert)
    checkpoint = source.checkpoint
    assert isinstance(checkpoint, GgufWeights)
    gate, up, down = (_read(checkpoint, *place) for place in source.expert_names(layer, expert))
    return gate, up, down


def _read(checkpoint: GgufWeights, name: str, index: int | None) -> Blocks:
    kind, data = checkpoint.raw_slice(name, index or 0) if index is not None else checkpoint.raw_rows(name)
    if kind.name in KEPT:
        return Blocks(KEPT[kind.name], data.reshape(-1))
    return Blocks(WIDENED[kind.name], widened(kind.name, data.reshape(-1, kind.bytes)))


def widened(kind: str, blocks: np.ndarray) -> np.ndarray:
    """[N, bytes of a block] of a WIDENED type -> the same numbers as Q8_0, uint8 [N * 34]."""
    scale, rest = blocks[:, :SCALE_BYTES], blocks[:, SCALE_BYTES:]
    codes = _CODES[kind](rest)
    return np.concatenate([scale, codes.view(np.uint8)], axis=1).reshape(-1)


def _nibbles(data: np.ndarray) -> np.ndarray:
    """uint8 [N, 16] -> codes 0..15 [N, 32]: low nibbles first."""
    return np.concatenate([data & 15, data >> 4], axis=1)


def _q4_0(rest: np.ndarray) -> np.ndarray:
    return _nibbles(rest).astype(np.int8) - np.int8(8)


def _q5_0(rest: np.ndarray) -> np.ndarray:
    fifth = np.unpackbits(rest[:, :4], axis=1, bitorder="little")
    return (_nibbles(rest[:, 4:]) | fifth << 4).astype(np.int8) - np.int8(16)


def _iq4_nl(rest: np.ndarray) -> np.ndarray:
    values = np.array(gguf.quants.IQ4_NL.kvalues, dtype=np.int8)
    return values[_nibbles(rest)]


_CODES: dict[str, Callable[[np.ndarray], np.ndarray]] = {"Q4_0": _q4_0, "Q5_0": _q5_0, "IQ4_NL": _iq4_nl}


def pack_blocks(
    blocks: tuple[Blocks, Blocks, Blocks], format: str, hidden: int, inner: int, blob: np.ndarray
) -> None:
    """Re-tiles one expert into `blob` and proves it by turning it back.

    Raises ValueError for a scale that is not finite.
    """
    gate, up, down = parts = [part.data for part in blocks]
    _kernels.pack_ggml_expert(format, hidden, inner, gate, up, down, blob)
    back = _kernels.unpack_ggml_expert(format, hidden, inner, blob)
    for name, part, again in zip(PROJECTIONS, parts, back, strict=True):
        if not np.array_equal(part, again):
            raise KTError(f"{name}: blocks came back changed from the pack; this is a bug or failing memory")
