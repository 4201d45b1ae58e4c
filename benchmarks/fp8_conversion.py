"""FP8 safetensors of DeepSeek-V3's true dimensions into a bundle: peak memory, and GB of FP8 a second.

python benchmarks/fp8_conversion.py -o DIR [--experts 64] [--cpu-format int8] [--keep]

Writes a random slice (one dense and one MoE layer; 64 experts: 3.6 GB), converts it with one worker, and
measures in the same run what the parts could do alone: writing and reading the file (flushed; page cache
dropped where the OS lets us), decoding FP8, quantising an expert into a pack, and comparing what was packed
with what was read. A conversion writes about as many bytes as it reads, and reads its source twice, once to
hash it. On a busy machine the line in CPU seconds is the one to compare.
"""

import argparse
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from make_slice import ITEM_BYTES, Shapes, model_shapes, slice_config

from kttools.checkpoint.fp8 import BlockFormat, decode_blocks
from kttools.quantize.report import expert_errors
from kttools_runtime import _kernels
from kttools_runtime.experts import as_numpy

BLOCK = 128
BLOCK_BYTES = 16 << 20
WRITE_BYTES = 64 << 10
HIDDEN, INNER = 7168, 2048
VOCAB = 1024
QUANTIZATION = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]}


def fp8_shapes(shapes: Shapes) -> Shapes:
    """Linears as codes and scales, the rest as it is."""
    found: Shapes = {}
    for name, (dtype, shape) in shapes.items():
        is_linear = len(shape) == 2 and "proj" in name
        if not is_linear:
            found[name] = (dtype, shape)
            continue
        found[name] = ("F8_E4M3", shape)
        found[name + "_scale_inv"] = ("F32", (-(-shape[0] // BLOCK), -(-shape[1] // BLOCK)))
    return found


def write_slice(directory: Path, experts: int) -> tuple[int, float]:
    """Bytes written, and GB a second of writing and flushing them alone."""
    directory.mkdir(parents=True)
    config = slice_config(2, experts, VOCAB) | {"quantization_config": QUANTIZATION}
    (directory / "config.json").write_text(json.dumps(config))
    sizes, header, offset = {"F8_E4M3": 1} | ITEM_BYTES, {}, 0
    shapes = fp8_shapes(model_shapes(config))
    for name, (dtype, shape) in shapes.items():
        end = offset + sizes[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    rng, writing = np.random.default_rng(0), 0.0
    with (directory / "model.safetensors").open("wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for dtype, shape in shapes.values():
            left = math.prod(shape)
            while left:
                count = min(left, BLOCK_BYTES)
                data = memoryview(values(rng, dtype, count))
                started = time.monotonic()
                for begin in range(0, len(data), WRITE_BYTES):
                    file.write(data[begin : begin + WRITE_BYTES])
                writing += time.monotonic() - started
                left -= count
        started = time.monotonic()
        os.fsync(file.fileno())
        writing += time.monotonic() - started
    return offset, offset / writing / 1e9


def values(rng: np.random.Generator, dtype: str, count: int) -> bytes:
    if dtype == "F8_E4M3":
        return (rng.integers(0, 256, count, dtype=np.uint8) & 0xFE).tobytes()  # never NaN
    if dtype == "F32":
        return np.full(count, 1e-4, np.float32).tobytes()
    return np.full(count, 0x3C00, np.uint16).tobytes()  # bf16 0.0078


def seconds(job: Callable[[], object], rounds: int = 3) -> float:
    """The best of some rounds, wall clock."""
    best = math.inf
    for _ in range(rounds):
        started = time.monotonic()
        job()
        best = min(best, time.monotonic() - started)
    return best


def read_speed(file: Path) -> float:
    """GB a second of reading the file in order."""
    with file.open("rb", buffering=0) as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        buffer, started, total = bytearray(BLOCK_BYTES), time.monotonic(), 0
        while count := stream.readinto(buffer):
            total += count
    return total / (time.monotonic() - started) / 1e9


def part_speeds(cpu_format: str) -> dict[str, float]:
    """GB of FP8 a second of one thread, for one expert."""
    rng = np.random.default_rng(0)
    shapes = ((INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER))
    codes = [torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8) & 0xFE) for shape in shapes]
    scales = [torch.full((rows // BLOCK, columns // BLOCK), 1e-4) for rows, columns in shapes]
    block, size = BlockFormat(BLOCK, BLOCK), 3 * HIDDEN * INNER / 1e9

    def decode() -> list[torch.Tensor]:
        return [decode_blocks(c, s, block, "x") for c, s in zip(codes, scales, strict=True)]

    arrays = [as_numpy(tensor) for tensor in decode()]
    blob = np.empty(_kernels.expert_bytes(cpu_format, HIDDEN, INNER), np.uint8)
    pack = seconds(lambda: _kernels.pack_expert(cpu_format, *arrays, blob))
    compare = seconds(lambda: expert_errors(cpu_format, arrays, blob))
    times = {"decode FP8": seconds(decode), "quantise": pack, "read back and compare": compare}
    return {name: size / taken for name, taken in times.items()}


def convert(source: Path, target: Path, cpu_format: str) -> tuple[float, float, int]:
    """(seconds, CPU seconds, peak resident bytes) of `kttools quantize` with one worker."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "kttools", "quantize", str(source), "-o", str(target), "--workers", "1"]
    command += ["--cpu-format", cpu_format, "--gpu-format", "int8", "--quiet"]
    started, peak = time.monotonic(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        lines = status.read_text().splitlines()
        peak = max([peak, *(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))])
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"kttools quantize failed with {process.returncode}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.monotonic() - started, cpu, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True, help="a new directory, removed after")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--cpu-format", default="int8")
    parser.add_argument("--keep", action="store_true", help="leave the slice and the bundle there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    try:
        written, speed = write_slice(options.output / "fp8", options.experts)
        size = written / 1e9
        rows = {"write the file": speed}
        rows["read the file"] = read_speed(options.output / "fp8" / "model.safetensors")
        rows |= part_speeds(options.cpu_format)
        taken, cpu, peak = convert(options.output / "fp8", options.output / "bundle", options.cpu_format)
    finally:
        if not options.keep:
            shutil.rmtree(options.output, ignore_errors=True)
    title = f"{size:.2f} GB of FP8 to {options.cpu_format}, one worker"
    print(f"{title}: {taken:.1f} s, peak {peak / 2**30:.2f} GiB\n")
    print("| part | GB of FP8 a second |\n|--|--|")
    rows |= {"all of `kttools quantize`": size / taken, "the same in CPU seconds": size / cpu}
    for name, speed in rows.items():
        print(f"| {name} | {speed:.3f} |")


if __name__ == "__main__":
    main()
