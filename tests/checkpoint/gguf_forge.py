"""Writes GGUF files byte by byte, lies included; no code of the reader or of our writer."""

import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
FORMATS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "B"}
FORMATS |= {U64: "Q", I64: "q", F64: "d"}


def text(value: str | bytes, length: int | None = None) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data) if length is None else length) + data


def value(kind: int, content: Any) -> bytes:
    """kind and content; an array's content is (kind of elements, list), or raw bytes to lie with."""
    if isinstance(content, bytes) and kind != STRING:
        return struct.pack("<I", kind) + content
    if kind == ARRAY:
        inner, items = content
        body = struct.pack("<IQ", inner, len(items)) + b"".join(value(inner, item)[4:] for item in items)
        return struct.pack("<I", ARRAY) + body
    if kind == STRING:
        return struct.pack("<I", kind) + text(content)
    return struct.pack("<I", kind) + struct.pack("<" + FORMATS[kind], content)


@dataclass
class Tensor:
    """dims: fastest first, as GGUF has them; offset: None for the honest one."""

    name: str | bytes
    dims: tuple[int, ...] = (32,)
    kind: int = 0
    data: bytes = bytes(128)
    offset: int | None = None
    n_dims: int | None = None


@dataclass
class Image:
    """A GGUF file; every field that is None is what it should be."""

    pairs: list[tuple[str | bytes, int, Any]] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    magic: bytes = b"GGUF"
    version: int = 3
    tensor_count: int | None = None
    pair_count: int | None = None
    alignment: int = 32
    tail: bytes = b""
    cut: int | None = None

    def bytes(self) -> bytes:
        table, data = b"", b""
        for tensor in self.tensors:
            offset = len(data) if tensor.offset is None else tensor.offset
            count = len(tensor.dims) if tensor.n_dims is None else tensor.n_dims
            table += text(tensor.name) + struct.pack("<I", count)
            table += b"".join(struct.pack("<Q", dim % 2**64) for dim in tensor.dims)
            table += struct.pack("<IQ", tensor.kind % 2**32, offset % 2**64)
            data += tensor.data + bytes(-len(tensor.data) % self.alignment)
        tensors = len(self.tensors) if self.tensor_count is None else self.tensor_count
        pairs = len(self.pairs) if self.pair_count is None else self.pair_count
        head = self.magic + struct.pack("<IQQ", self.version, tensors, pairs)
        head += b"".join(text(key) + value(kind, content) for key, kind, content in self.pairs) + table
        if self.tensors:
            head += bytes(-len(head) % self.alignment)
        whole = head + data + self.tail
        return whole if self.cut is None else whole[: self.cut]

    def save(self, path: Path) -> Path:
        path.write_bytes(self.bytes())
        return path


def f32(name: str, array: np.ndarray) -> Tensor:
    data = np.ascontiguousarray(array, dtype="<f4")
    return Tensor(name, tuple(reversed(data.shape)), 0, data.tobytes())


TOKENS = [chr(c) for c in range(33, 127)] + ["\u0120", "th", "\u0120th", "<s>", "</s>", "<u>"]


def deepseek2_pairs(**changes: Any) -> list[tuple[str, int, Any]]:
    """Metadata of the model of deepseek2_tensors(); a value of ... removes a key, (kind, value) sets one."""
    values: dict[str, tuple[int, Any]] = {
        "general.architecture": (STRING, "deepseek2"),
        "deepseek2.block_count": (U32, 2),
        "deepseek2.context_length": (U32, 128),
        "deepseek2.embedding_length": (U32, 32),
        "deepseek2.feed_forward_length": (U32, 40),
        "deepseek2.attention.head_count": (U32, 2),
        "deepseek2.attention.head_count_kv": (U32, 1),
        "deepseek2.rope.freq_base": (F32, 10000.0),
        "deepseek2.attention.layer_norm_rms_epsilon": (F32, 1e-6),
        "deepseek2.expert_used_count": (U32, 2),
        "deepseek2.expert_count": (U32, 4),
        "deepseek2.expert_feed_forward_length": (U32, 32),
        "deepseek2.expert_shared_count": (U32, 1),
        "deepseek2.expert_gating_func": (U32, 2),
        "deepseek2.expert_group_count": (U32, 2),
        "deepseek2.expert_group_used_count": (U32, 1),
        "deepseek2.expert_weights_scale": (F32, 2.5),
        "deepseek2.expert_weights_norm": (BOOL, 1),
        "deepseek2.leading_dense_block_count": (U32, 1),
        "deepseek2.attention.kv_lora_rank": (U32, 16),
        "deepseek2.attention.q_lora_rank": (U32, 12),
        "deepseek2.attention.key_length": (U32, 20),
        "deepseek2.attention.value_length": (U32, 16),
        "deepseek2.attention.key_length_mla": (U32, 12),
        "deepseek2.attention.value_length_mla": (U32, 6),
        "deepseek2.rope.dimension_count": (U32, 4),
        "tokenizer.ggml.model": (STRING, "gpt2"),
        "tokenizer.ggml.pre": (STRING, "deepseek-v3"),
        "tokenizer.ggml.tokens": (ARRAY, (STRING, TOKENS)),
        "tokenizer.ggml.token_type": (ARRAY, (I32, [1] * 97 + [3, 3, 4])),
        "tokenizer.ggml.merges": (ARRAY, (STRING, ["t h", "\u0120 th"])),
        "tokenizer.ggml.bos_token_id": (U32, 97),
        "tokenizer.ggml.eos_token_id": (U32, 98),
        "tokenizer.ggml.add_bos_token": (BOOL, 1),
        "tokenizer.chat_template": (STRING, "{{ messages[0].content }}"),
    }
    for key, new in changes.items():
        if new is ...:
            values.pop(key, None)
        else:
            values[key] = new
    return [(key, kind, content) for key, (kind, content) in values.items()]


SIZES = {"hidden": 32, "heads": 2, "nope": 8, "rope": 4, "v": 6, "rank": 16, "q_rank": 12, "experts": 4}


def deepseek2_arrays(layout: str = "k_b + v_b", seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 arrays under ggml names; layout: "kv_b", "k_b + v_b" or "both"."""
    rng = np.random.default_rng(seed)
    h, s = SIZES["hidden"], SIZES
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (100, h), "output.weight": (100, h)}
    shapes["output_norm.weight"] = (h,)
    for layer in range(2):
        p = f"blk.{layer}."
        shapes |= {p + "attn_norm.weight": (h,), p + "ffn_norm.weight": (h,)}
        shapes |= {p + "attn_q_a.weight": (s["q_rank"], h), p + "attn_q_a_norm.weight": (s["q_rank"],)}
        shapes[p + "attn_q_b.weight"] = (s["heads"] * (s["nope"] + s["rope"]), s["q_rank"])
        shapes[p + "attn_kv_a_mqa.weight"] = (s["rank"] + s["rope"], h)
        shapes[p + "attn_kv_a_norm.weight"] = (s["rank"],)
        shapes[p + "attn_kv_b.weight"] = (s["heads"] * (s["nope"] + s["v"]), s["rank"])
        shapes[p + "attn_output.weight"] = (h, s["heads"] * s["v"])
    for name, shape in {"ffn_gate": (40, h), "ffn_up": (40, h), "ffn_down": (h, 40)}.items():
        shapes[f"blk.0.{name}.weight"] = shape
    shapes |= {"blk.1.ffn_gate_inp.weight": (s["experts"], h), "blk.1.exp_probs_b.bias": (s["experts"],)}
    for name, shape in {"ffn_gate": (32, h), "ffn_up": (32, h), "ffn_down": (h, 32)}.items():
        shapes[f"blk.1.{name}_shexp.weight"] = shape
        shapes[f"blk.1.{name}_exps.weight"] = (s["experts"], *shape)
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    for layer in range(2):
        arrays |= split_kv_b(arrays, f"blk.{layer}.", layout)
        if layout == "k_b + v_b":
            del arrays[f"blk.{layer}.attn_kv_b.weight"]
    return arrays


def split_kv_b(arrays: dict[str, np.ndarray], prefix: str, layout: str) -> dict[str, np.ndarray]:
    """attn_k_b [heads, rank, nope] and attn_v_b [heads, v, rank] of attn_kv_b, element by element."""
    if layout == "kv_b":
        return {}
    joint, s = arrays[prefix + "attn_kv_b.weight"], SIZES
    key = np.empty((s["heads"], s["rank"], s["nope"]), np.float32)
    value_part = np.empty((s["heads"], s["v"], s["rank"]), np.float32)
    for head in range(s["heads"]):
        first = head * (s["nope"] + s["v"])
        for i in range(s["nope"]):
            key[head, :, i] = joint[first + i]
        for i in range(s["v"]):
            value_part[head, i] = joint[first + s["nope"] + i]
    return {prefix + "attn_k_b.weight": key, prefix + "attn_v_b.weight": value_part}


def deepseek2(layout: str = "k_b + v_b", **changes: Any) -> Image:
    """A small sound model."""
    arrays = deepseek2_arrays(layout)
    return Image(deepseek2_pairs(**changes), [f32(name, array) for name, array in arrays.items()])
