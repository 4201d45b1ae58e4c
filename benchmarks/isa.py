"""Our kernels without AMX beside llama.cpp's for the same instruction set: one MoE layer, calls in turns.

    python benchmarks/isa.py --isa avx512 --peer ggml_layer-avx512 [--shape v3] [--format int8] [-t 2]

The peer is benchmarks/ggml_layer.cpp linked to a ggml that was compiled for that instruction set and nothing
above it (benchmarks/README.md has the commands). It stands against int8 with Q8_0 and against int4 with Q4_0
and Q4_K, both repacked, as llama.cpp does by default, and as they lie in a file (its --no-repack), which for
experts is often faster; weights in huge pages, on as many threads. Its output's size is checked against
theory, so that a broken build cannot pass for a slow one. `peer / ours` is the ratio of medians.
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path
from types import TracebackType

import torch

from kttools.bench import report
from kttools.bench.experts import Plan, Row, run
from kttools.bench.shapes import LayerShape, parse_shape
from kttools_runtime.errors import EngineError, UsageError
from kttools_runtime.experts import ExpertEngine

EXPERTS = {"v3": 32, "qwen3": 128}
TYPES = {"int8": ("q8_0",), "int4": ("q4_0", "q4_K", "q4_0/file", "q4_K/file")}
BITS = {"q8_0": 8.5, "q4_0": 4.5, "q4_K": 4.5}
TOKENS = (1, 8, 32, 128, 512)
LEAST_SAMPLE = 64  # outputs of fewer tokens vary too much in size to be checked
TOLERANCE = 0.1


def expected_rms(top_k: int) -> float:
    """Of the output: unit rows, weights scaled by fan-in, all experts alike, router weights in [0, 1)."""
    gate = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    density = torch.exp(-gate * gate / 2)
    silu_squared = float((torch.nn.functional.silu(gate) ** 2 * density).sum() / density.sum())
    return float((silu_squared * (top_k**2 / 4 + top_k / 12)) ** 0.5)


class GgmlPeer:
    """A ggml_layer process, in the place of kttools.bench's peer; a context manager."""

    huge_page_share = None

    def __init__(self, program: Path, type_name: str, isa: str) -> None:
        self.name = f"llama.cpp {type_name}"
        self.isa, self._program = isa, program
        self._type, _, form = type_name.partition("/")
        self._repack = form != "file"
        self.expert_bytes = 0
        self._expected = 0.0
        self._process: subprocess.Popen[str] | None = None

    def load(self, shape: LayerShape, format: str, threads: int, max_tokens: int) -> None:
        """Starts the process; it makes its weights. Raises UsageError, EngineError."""
        sizes = (shape.hidden_size, shape.moe_intermediate_size, shape.num_experts, shape.top_k)
        arguments = [*map(str, sizes), self._type, str(threads), str(int(self._repack))]
        try:
            self._process = subprocess.Popen(
                [self._program, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        except OSError as error:
            raise UsageError(f"cannot run {self._program}: {error}") from None
        if self._line() != "ready":
            raise EngineError(f"{self._program} did not get ready")
        self.expert_bytes = round(shape.weights_per_expert * BITS[self._type] / 8)
        self._expected = expected_rms(shape.top_k)

    def call(self, num_tokens: int) -> tuple[float, int]:
        """(seconds, experts hit) of one call with fresh ids. Raises EngineError for a wrong output."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(f"{num_tokens}\n")
        self._process.stdin.flush()
        seconds, experts_hit, rms = self._line().split()
        if num_tokens >= LEAST_SAMPLE and not abs(float(rms) / self._expected - 1) <= TOLERANCE:
            raise EngineError(f"{self.name}: the output has rms {rms}, expected about {self._expected:.3f}")
        return float(seconds), int(experts_hit)

    def _line(self) -> str:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if not line:
            raise EngineError(f"{self.name} died (exit status {self._process.wait()})")
        return line

    def __enter__(self) -> "GgmlPeer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.communicate()


def measure(options: argparse.Namespace, type_name: str) -> list[Row]:
    """Rows of ours and of the peer's with one of its types."""
    shape = parse_shape(options.shape, options.experts or EXPERTS.get(options.shape, 32), options.top_k)
    tokens = tuple(int(n) for n in options.tokens.split(","))
    plan = Plan(shape, options.format, tokens, options.repeat)
    engine = ExpertEngine(options.threads, options.isa)
    with GgmlPeer(options.peer, type_name, options.isa) as peer:
        return run(engine, plan, peer, lambda text: print(text, file=sys.stderr))  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--isa", required=True, help="kernel table of ours: avx512 or avx2")
    parser.add_argument("--peer", required=True, type=Path, help="ggml_layer, built for the same")
    parser.add_argument("--shape", default="v3", metavar="v3|qwen3|HxI")
    parser.add_argument("--experts", type=int, default=0, help="default: 32 (v3), 128 (qwen3)")
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--format", default="int8", choices=TYPES)
    parser.add_argument("--type", action="append", help="only this type of the peer's; may be repeated")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), metavar="N,N,...")
    parser.add_argument("-t", "--threads", type=int, default=None)
    parser.add_argument("-r", "--repeat", type=int, default=0, help="calls a row; default 21 to 5")
    parser.add_argument("-o", "--output", default="md", choices=report.STYLES)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for name in options.type or TYPES[options.format] for row in measure(options, name)]
    machine = report.machine()
    records = [{**machine, **report.expert_record(row)} for row in rows]
    worst = min(row.ratio for row in rows if row.ratio is not None)
    middle = statistics.median(row.ratio for row in rows if row.ratio is not None)
    notes = [
        f"{machine['cpu_info']}, {rows[0].threads} threads, {options.isa}, {machine['test_time']}; "
        f"{rows[0].shape.num_experts} experts of {options.shape}, top-{options.top_k}.",
        f"llama.cpp / ours: at least {worst:.2f}, median {middle:.2f}.",
    ]
    print(report.render(records, options.output, report.EXPERT_COLUMNS, notes), end="")


if __name__ == "__main__":
    main()
