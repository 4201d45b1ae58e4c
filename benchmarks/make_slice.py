"""Write a random-weight slice of DeepSeek-V3 as a Hugging Face checkpoint: true dimensions, few layers.

    python benchmarks/make_slice.py -o DIR      1 dense + 2 MoE layers, 64 experts: 7.14 B weights, 14.3 GB

Speed does not depend on what the weights are, so a benchmark of prefill and decode needs no download. Each
tensor is drawn from its own generator, seeded by its name: the same files come out on every machine, and only
a block of one tensor is in memory at a time.
"""

import argparse
import json
import math
import os
import shutil
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

TOKENIZER = Path(__file__).resolve().parents[1] / "samples" / "ds3-nano"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
)
SHARD_BYTES = 4 << 30
BLOCK_ELEMENTS = 1 << 20
ITEM_BYTES = {"BF16": 2, "F32": 4}
WEIGHT_STD = 0.02
BIAS_STD = 0.01  # e_score_correction_bias: small against the sigmoid scores it is added to

Shapes = dict[str, tuple[str, tuple[int, ...]]]


def slice_config(layers: int, experts: int, vocab: int) -> dict[str, Any]:
    """config.json of DeepSeek-V3, but with one dense layer, fewer experts and a smaller vocabulary."""
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "first_k_dense_replace": 1,
        "hidden_act": "silu",
        "hidden_size": 7168,
        "initializer_range": WEIGHT_STD,
        "intermediate_size": 18432,
        "kv_lora_rank": 512,
        "max_position_embeddings": 16384,
        "model_type": "deepseek_v3",
        "moe_intermediate_size": 2048,
        "moe_layer_freq": 1,
        "n_group": 8,
        "n_routed_experts": experts,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": layers,
        "num_key_value_heads": 128,
        "num_nextn_predict_layers": 0,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-06,
        "rope_interleave": True,
        "rope_theta": 10000.0,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "topk_group": 4,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "v_head_dim": 128,
        "vocab_size": vocab,
    }


def mlp_shapes(prefix: str, hidden: int, intermediate: int) -> Shapes:
    shapes = {
        "gate_proj": (intermediate, hidden),
        "up_proj": (intermediate, hidden),
        "down_proj": (hidden, intermediate),
    }
    return {f"{prefix}.{name}.weight": ("BF16", shape) for name, shape in shapes.items()}


def attention_shapes(prefix: str, config: dict[str, Any]) -> Shapes:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    nope, rope, v_dim = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    q_rank, kv_rank = config["q_lora_rank"], config["kv_lora_rank"]
    shapes: dict[str, tuple[int, ...]] = {
        "q_a_proj": (q_rank, hidden),
        "q_a_layernorm": (q_rank,),
        "q_b_proj": (heads * (nope + rope), q_rank),
        "kv_a_proj_with_mqa": (kv_rank + rope, hidden),
        "kv_a_layernorm": (kv_rank,),
        "kv_b_proj": (heads * (nope + v_dim), kv_rank),
        "o_proj": (hidden, heads * v_dim),
    }
    return {f"{prefix}.{name}.weight": ("BF16", shape) for name, shape in shapes.items()}


def moe_shapes(prefix: str, config: dict[str, Any]) -> Shapes:
    hidden, experts, inner = (
        config["hidden_size"],
        config["n_routed_experts"],
        config["moe_intermediate_size"],
    )
    shapes: Shapes = {
        f"{prefix}.gate.weight": ("BF16", (experts, hidden)),
        f"{prefix}.gate.e_score_correction_bias": ("F32", (experts,)),
        **mlp_shapes(f"{prefix}.shared_experts", hidden, inner * config["n_shared_experts"]),
    }
    for expert in range(experts):
        shapes |= mlp_shapes(f"{prefix}.experts.{expert}", hidden, inner)
    return shapes


def model_shapes(config: dict[str, Any]) -> Shapes:
    """Every tensor of the checkpoint, in the order it is written: name -> (dtype, shape)."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    shapes: Shapes = {"model.embed_tokens.weight": ("BF16", (vocab, hidden))}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}.{norm}.weight"] = ("BF16", (hidden,))
        shapes |= attention_shapes(f"{prefix}.self_attn", config)
        if layer < config["first_k_dense_replace"]:
            shapes |= mlp_shapes(f"{prefix}.mlp", hidden, config["intermediate_size"])
        else:
            shapes |= moe_shapes(f"{prefix}.mlp", config)
    shapes["model.norm.weight"] = ("BF16", (hidden,))
    shapes["lm_head.weight"] = ("BF16", (vocab, hidden))
    return shapes


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return ITEM_BYTES[dtype] * math.prod(shape)


def to_bf16(values: np.ndarray) -> np.ndarray:
    """float32 to bf16 bit patterns, rounded to nearest even."""
    bits = values.view(np.uint32)
    bits += 0x7FFF + ((bits >> 16) & 1)
    return (bits >> 16).astype(np.uint16)


def tensor_blocks(name: str, dtype: str, shape: tuple[int, ...], seed: int) -> Iterator[np.ndarray]:
    """The elements in order, a block at a time: ones for norms, Gaussian noise for everything else."""
    generator = np.random.Generator(np.random.SFC64([seed, zlib.crc32(name.encode())]))
    std = WEIGHT_STD if dtype == "BF16" else BIAS_STD
    total = math.prod(shape)
    for start in range(0, total, BLOCK_ELEMENTS):
        count = min(BLOCK_ELEMENTS, total - start)
        if name.endswith("norm.weight"):
            values = np.ones(count, np.float32)
        else:
            values = generator.standard_normal(count, np.float32)
            values *= std
        yield to_bf16(values) if dtype == "BF16" else values


def shards(shapes: Shapes) -> list[Shapes]:
    """Split in order, a new shard before the tensor that would pass SHARD_BYTES."""
    parts: list[Shapes] = [{}]
    used = 0
    for name, entry in shapes.items():
        size = tensor_bytes(*entry)
        if parts[-1] and used + size > SHARD_BYTES:
            parts.append({})
            used = 0
        parts[-1][name] = entry
        used += size
    return parts


def safetensors_header(shapes: Shapes) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in shapes.items():
        end = offset + tensor_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_shard(file: BinaryIO, shapes: Shapes, seed: int) -> Iterator[int]:
    """Header, then the tensors one by one; yields the bytes of each block as it is written."""
    file.write(safetensors_header(shapes))
    for name, (dtype, shape) in shapes.items():
        for block in tensor_blocks(name, dtype, shape, seed):
            yield file.write(memoryview(block).cast("B"))


def write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def write_checkpoint(directory: Path, config: dict[str, Any], seed: int) -> int:
    """Write everything into `directory`, which must be empty. Returns the bytes of all tensors."""
    parts = shards(model_shapes(config))
    total = sum(tensor_bytes(*entry) for part in parts for entry in part.values())
    weight_map: dict[str, str] = {}
    with tqdm(total=total, unit="B", unit_scale=True, file=sys.stderr) as progress:
        for number, part in enumerate(parts, 1):
            shard = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
            weight_map |= dict.fromkeys(part, shard)
            with (directory / shard).open("wb") as file:
                for written in write_shard(file, part, seed):
                    progress.update(written)
    write_json(
        directory / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": weight_map},
    )
    write_json(directory / "config.json", config)
    for name in TOKENIZER_FILES:
        shutil.copyfile(TOKENIZER / name, directory / name)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="must not exist")
    parser.add_argument(
        "--experts", type=int, default=64, help="routed experts, a multiple of 8 (default 64)"
    )
    parser.add_argument("--layers", type=int, default=3, help="layers, the first one dense (default 3)")
    parser.add_argument(
        "--vocab", type=int, default=32000, help="at least the tokenizer's 8192 (default 32000)"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    # Four of eight groups must hold the eight experts of a token.
    if options.experts < 16 or options.experts % 8:
        parser.error("--experts must be a multiple of 8, at least 16")
    if options.layers < 1 or options.vocab < 8192:
        parser.error("--layers must be at least 1 and --vocab at least 8192")
    if options.output.exists():
        parser.error(f"{options.output} exists; give a new directory")
    partial = options.output.with_name(options.output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    total = write_checkpoint(
        partial, slice_config(options.layers, options.experts, options.vocab), options.seed
    )
    os.rename(partial, options.output)
    print(f"{options.output}: {total / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
