"""How fast weights of other formats are decoded: ggml types beside the gguf package, FP8 beside torch's cast.

python benchmarks/decode_weights.py [--weights N] [--rounds N]

One thread, in turns (ours, theirs, ours, ...), medians; millions of weights a second.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import gguf
import numpy as np
import torch

from kttools.checkpoint.gguf.types import BY_NAME, decode
from kttools_runtime import _kernels

Job = Callable[[], object]


def seconds(job: Job) -> float:
    started = time.thread_time()
    job()
    return time.thread_time() - started


def compare(ours: Job, theirs: Job, weights: int, rounds: int) -> tuple[float, float]:
    """Millions of weights a second of CPU time."""
    both: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for times, job in zip(both, (ours, theirs), strict=True):
            times.append(seconds(job))
    ours_s, theirs_s = (statistics.median(times) for times in both)
    return weights / ours_s / 1e6, weights / theirs_s / 1e6


def ggml(name: str, weights: int, rounds: int) -> tuple[float, float]:
    kind = BY_NAME[name]
    blocks = weights // kind.block
    data = np.random.default_rng(0).integers(0, 120, (blocks, kind.bytes), dtype=np.uint8)
    return compare(
        lambda: decode(data.reshape(-1), kind, kind.block),
        lambda: gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name]),
        weights,
        rounds,
    )


def fp8(weights: int, rounds: int) -> tuple[float, float]:
    rows, columns = weights // 7168, 7168
    codes = np.random.default_rng(0).integers(0, 120, (rows, columns), dtype=np.uint8)
    scales = np.ones((-(-rows // 128), columns // 128), np.float32)
    out = np.empty((rows, columns), np.uint16)
    wide = torch.from_numpy(scales).repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)
    float8 = torch.from_numpy(codes).view(torch.float8_e4m3fn)
    return compare(
        lambda: _kernels.decode_fp8(codes, scales, 128, 128, 0, out),
        lambda: (float8.to(torch.float32) * wide).to(torch.bfloat16),
        rows * columns,
        rounds,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=int, default=2048 * 7168)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| type | ours | gguf or torch | ratio |\n|--|--|--|--|")
    rows = {
        name: ggml(name, options.weights, options.rounds)
        for name in (*_kernels.GGML_TYPES, *_kernels.GGML_CODEBOOKS)
    }
    rows["FP8 e4m3"] = fp8(options.weights, options.rounds)
    for name, (ours, theirs) in rows.items():
        print(f"| {name} | {ours:.0f} | {theirs:.0f} | {ours / theirs:.1f} |")


if __name__ == "__main__":
    main()
