"""One token through an attention half with grouped queries: the native step beside torch's operations.

python benchmarks/gqa_decode.py [--shape qwen3] [--context 128,4096] [--threads 1]

Random bf16 matrices of the family's true sizes. Both paths have the same weights and cache and take turns;
prints the median microseconds of each and their ratio. `small` has hardly any weights: what is left is what
a layer costs besides its matrices.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kttools_runtime import _kernels
from kttools_runtime.attention import Step
from kttools_runtime.config import ModelConfig
from kttools_runtime.gqa import GroupedQueryAttention
from kttools_runtime.linear import Placement
from kttools_runtime.mlp import GatedMLP
from kttools_runtime.model import DecoderLayer, build_norm
from kttools_runtime.rope import Rope
from kttools_runtime.step import NativeHalves
from kttools_runtime.weights import LinearWeights

INNER = 64  # of the dense MLP that a layer must have; it is not measured


@dataclass(frozen=True)
class Shape:
    """hidden_size, heads, key heads, head_dim, rotated part, and what the family has."""

    hidden_size: int
    heads: int
    kv_heads: int
    dim: int
    rope: int
    has_bias: bool = False
    has_norm: bool = False
    has_sinks: bool = False
    window: int | None = None


SHAPES = {
    "qwen3": Shape(2048, 32, 4, 128, 128, has_norm=True),
    "mixtral": Shape(4096, 32, 8, 128, 128),
    "glm4": Shape(4096, 96, 8, 128, 64, has_bias=True),
    "gpt-oss": Shape(2880, 64, 8, 64, 64, has_bias=True, has_sinks=True),
    "gpt-oss-window": Shape(2880, 64, 8, 64, 64, has_bias=True, has_sinks=True, window=128),
    "small": Shape(64, 16, 2, 32, 32, has_norm=True),
}


# What a config must say and this measurement does not touch: one dense layer, no experts used.
REST = {
    "vocab_size": 64,
    "intermediate_size": INNER,
    "moe_intermediate_size": INNER,
    "num_hidden_layers": 1,
    "moe_layers": [],
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "max_position_embeddings": 1 << 17,
    "bos_token_id": 0,
    "eos_token_ids": [1],
    "attention": "gqa",
    "q_lora_rank": None,
    "kv_lora_rank": 0,
    "rope_theta": 10000.0,
    "rope_interleave": False,
    "rope_scaling": None,
    "router": "softmax_groups",
    "n_routed_experts": 1,
    "n_shared_experts": 0,
    "num_experts_per_tok": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
}


def config_of(shape: Shape) -> ModelConfig:
    own = {
        "hidden_size": shape.hidden_size,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "qk_nope_head_dim": shape.dim - shape.rope,
        "qk_rope_head_dim": shape.rope,
        "v_head_dim": shape.dim,
        "attention_bias": shape.has_bias,
    }
    flags = {"attention_output_bias": shape.has_bias, "qk_norm": shape.has_norm}
    flags["attention_sinks"] = shape.has_sinks
    return ModelConfig.from_dict(REST | own | {name: True for name, value in flags.items() if value})


class RandomWeights:
    """Matrices and vectors of any name."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)

    def linear(self, base: str, out_features: int, in_features: int) -> LinearWeights:
        values = torch.randn(out_features, in_features, generator=self._generator) / in_features**0.5
        return LinearWeights(base, in_features, "float", {"weight": values.to(torch.bfloat16)})

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator)


def make_layer(shape: Shape, threads: int) -> DecoderLayer:
    config, engine = config_of(shape), _kernels.Engine(threads)
    placement = Placement(RandomWeights(), torch.device("cpu"), torch.bfloat16, engine)
    attention = GroupedQueryAttention(config, placement, "x", shape.window)
    norms = [build_norm(config, placement, name) for name in ("before", "between")]
    layer = DecoderLayer(norms[0], attention, norms[1], GatedMLP(placement, "y", shape.hidden_size, INNER))
    layer.native = NativeHalves(engine, layer)
    return layer


def medians(calls: list[Callable[[], object]], rounds: int) -> list[float]:
    """Microseconds of each call, in turns."""
    times: list[list[int]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, own in zip(calls, times, strict=True):
            call()  # finds its weights as warm as they get
            started = time.perf_counter_ns()
            call()
            own.append(time.perf_counter_ns() - started)
    return [statistics.median(own) / 1000 for own in times]


def measure(name: str, layer: DecoderLayer, context: int, rounds: int) -> None:
    shape, config = SHAPES[name], layer.attention.config
    cache = torch.randn(context, config.cache_width).to(torch.bfloat16)
    step = Step(context - 1, 1, Rope(config, torch.device("cpu")).rotations(context - 1, 1))
    hidden = torch.randn(1, shape.hidden_size)

    def modules() -> None:
        own = hidden.clone()
        own += layer.attention(layer.attention_norm(own), step, cache)

    def native() -> None:
        if layer.native is None or not layer.native.attend(hidden.clone(), step, cache):
            raise SystemExit("the native step did not run")

    torch_us, native_us = medians([modules, native], rounds)
    megabytes = min(context, shape.window or context) * config.cache_width * 2 / 1e6
    columns = [name, str(context), f"{megabytes:.1f}", f"{torch_us:.0f}", f"{native_us:.0f}"]
    print("| " + " | ".join([*columns, f"{torch_us / native_us:.2f}"]) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default=",".join(SHAPES))
    parser.add_argument("--context", default="128,4096,32768")
    parser.add_argument("-t", "--threads", type=int, default=1)
    parser.add_argument("-r", "--rounds", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("| shape | context | cache read, MB | torch us | native us | ratio |\n|--|--|--|--|--|--|")
    with torch.inference_mode():
        for name in options.shape.split(","):
            layer = make_layer(SHAPES[name], options.threads)
            for context in options.context.split(","):
                measure(name, layer, int(context), options.rounds)


if __name__ == "__main__":
    main()
