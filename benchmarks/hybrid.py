"""Decode with the dense part on a device: graph or not, both sides, their overlap, hot experts, logits.

    python benchmarks/hybrid.py BUNDLE [--device cuda:0] [--steps 32] [--context 512] [--hot 0,8,32] [--json]

Without a CUDA device it says so and ends, unless a simulated one is named (cpu:0): that runs the same code,
and its times mean nothing. All times are medians of single steps.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import kttools_runtime as kt
from kttools_runtime.device_footprint import device_footprints
from kttools_runtime.footprint import stored_tensors
from kttools_runtime.hybrid.devices import parse_devices
from kttools_runtime.hybrid.model import HybridModel
from kttools_runtime.manifest import load_manifest
from kttools_runtime.shards import ShardWeights

COPY_BYTES = 1 << 30
SIMULATED_COPY_BYTES = 64 << 20


class NoExperts:
    """A table that drops every choice: what is left of a step is the device's part and the handshake."""

    def select(
        self, expert_ids: torch.Tensor, expert_weights: torch.Tensor, scores: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full_like(expert_ids, -1), torch.zeros_like(expert_weights)


def main() -> int:
    given = arguments()
    devices = parse_devices(given.device) if given.device.startswith("cpu") else None
    if devices is None and not torch.cuda.is_available():
        sys.stderr.write("skipped: torch sees no CUDA device; --device cpu:0 runs the logic on the CPU\n")
        return 0
    report = measure(given)
    sys.stdout.write(json.dumps(report, indent=1) + "\n" if given.json else as_text(report))
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--hot", default="0", help="hot experts of a layer, several with commas")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """All figures; seconds, bytes, and ratios that the aims are about."""

    def opened(**options: Any) -> Any:
        return kt.load(given.bundle, device=given.device, threads=given.threads, prefill="cpu", **options)

    model = opened()
    bandwidth = device_bandwidth(model.device)
    graph = steps(model, given)
    both = steps_with_engine(model, given)
    without = steps(opened(graphs=False), given)
    alone = steps(without_experts(opened()), given)
    read_s = layer_bytes(given, model) / bandwidth
    report = {
        "device": device_name(model.device),
        "cpu_threads": model.threads,
        "torch": torch.__version__,
        "is_simulated": model.devices.is_simulated,
        "context_tokens": given.context,
        "logits_kl": logits_kl(given, model),
        "step_s": graph,
        "step_without_graph_s": without,
        "graph_gain": without / graph,
        "engine_s": both["engine_s"],
        "device_s": alone,
        "overlap": graph / max(both["engine_s"], alone),
        "device_layer_s": alone / model.config.num_hidden_layers,
        "device_bandwidth": bandwidth,
        "device_layer_over_bandwidth": alone / model.config.num_hidden_layers / read_s,
        "hot": [hot_row(given, opened, int(n), both["engine_s"], alone) for n in given.hot.split(",")],
    }
    return report


def steps(model: HybridModel, given: argparse.Namespace) -> float:
    """Median seconds of a step behind `context` tokens, the first ones (issued, captured) left out."""
    cache = model.new_cache(given.context + given.steps + 8)
    vocab = model.config.vocab_size
    model.prefill([i * 7919 % vocab for i in range(given.context)], cache)
    times = []
    for index in range(given.steps + 4):
        start = time.perf_counter()
        model.decode(index * 104729 % vocab, cache)
        times.append(time.perf_counter() - start)
    return statistics.median(times[4:])


def steps_with_engine(model: HybridModel, given: argparse.Namespace) -> dict[str, float]:
    """Seconds of a step in which the engine computes and in which a stream waits for it."""
    before = model.courier.queue.stats
    cache = model.new_cache(given.steps + 8)
    for index in range(given.steps):
        model.decode(index * 104729 % model.config.vocab_size, cache)
    after = model.courier.queue.stats
    return {
        "engine_s": (after["busy_s"] - before["busy_s"]) / given.steps,
        "waited_s": (after["waited_s"] - before["waited_s"]) / given.steps,
    }


def without_experts(model: Any) -> Any:
    for mixture in model.mixtures.values():
        mixture.layer.router.table = NoExperts()
    return model


def device_bandwidth(device: torch.device) -> float:
    """Bytes per second read and written by the better of five copies on the device."""
    size = COPY_BYTES if device.type == "cuda" else SIMULATED_COPY_BYTES
    source = torch.zeros(size // 4, dtype=torch.int32, device=device)
    target = torch.empty_like(source)

    def once() -> float:
        synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        return time.perf_counter() - start

    return 2 * size / min(once() for _ in range(5))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def layer_bytes(given: argparse.Namespace, model: HybridModel) -> float:
    """Weights and cached tokens that a layer reads in a step, the mean over all layers."""
    manifest = load_manifest(given.bundle)
    files = [manifest.path(name) for name in manifest.files if name.endswith(".safetensors")]
    tensors = stored_tensors(ShardWeights(files, manifest.linears).infos, manifest.linears)
    (whole,) = device_footprints(model.config, tensors, given.context, 1, model.dtype)
    return (whole.weight_bytes + whole.cache) / model.config.num_hidden_layers


def logits_kl(given: argparse.Namespace, model: HybridModel) -> float:
    """Median KL to the plain CPU path in float32, in nats: 1e-4 is what bf16 activations cost ds3-nano."""
    tokens = [i * 7919 % model.config.vocab_size for i in range(48)]
    plain = kt.load(given.bundle, dtype="float32", threads=given.threads)
    wanted, got = (m.logits(tokens).cpu().log_softmax(-1) for m in (plain, model))
    return float((wanted.exp() * (wanted - got)).sum(-1).median())


def hot_row(
    given: argparse.Namespace, opened: Callable[..., Any], count: int, engine_s: float, device_s: float
) -> dict[str, float]:
    """Tokens a second with `count` hot experts a layer, and what the share of choices they take predicts.

    Random tokens choose evenly, so that the engine keeps 1 - count / n_routed_experts of its work.
    """
    model = opened(gpu_experts=str(count)) if count else opened()
    share = 1 - count / model.config.n_routed_experts
    took = steps(model, given)
    predicted = max(engine_s * share, device_s)
    return {"experts": count, "tok_s": 1 / took, "predicted_tok_s": 1 / predicted}


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "simulated on the CPU"


def as_text(report: dict[str, Any]) -> str:
    lines = [f"{key:30} {value}" for key, value in report.items() if key != "hot"]
    lines += [f"hot {row['experts']:<4} {row['tok_s']:.2f} tok/s, predicted {row['predicted_tok_s']:.2f}"
              for row in report["hot"]]  # fmt: skip
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
