"""Stages of gpu_suite.py that are measured in a process of their own: each returns its part of the JSON."""

import importlib.metadata
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import kttools_runtime as kt
from kttools_runtime.hybrid import fused_router, linears
from kttools_runtime.hybrid.devices import parse_devices
from kttools_runtime.hybrid.packed_layout import packed_layout
from kttools_runtime.manifest import load_manifest
from kttools_runtime.weights import LinearWeights

SHAPE = (1536, 7168)  # q_a_proj of DeepSeek-V3
LINEAR_ROWS = (1, 16, 128, 1024)
PROMPTS = (64, 512, 2048)
ROUTED_ROWS = (1, 64, 1024)
TOKENS = 60


def check_device(device: str) -> None:
    """Ends the program where there is no such device."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        sys.stderr.write("skipped: torch sees no CUDA device; --device cpu:0 runs the logic on the CPU\n")
        raise SystemExit(0)


def device_name(device: str) -> str:
    if device.startswith("cpu"):
        return f"{device} (CPU)"
    return " and ".join(torch.cuda.get_device_name(name.strip()) for name in device.split(","))


def versions() -> dict[str, str | None]:
    try:
        triton: str | None = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    return {"torch": torch.__version__, "cuda": torch.version.cuda, "triton": triton}


def tokens_of(model: Any, count: int) -> list[int]:
    return [index * 7919 % model.config.vocab_size for index in range(count)]


def logits(device: str, bundles: list[Path]) -> dict[str, Any]:
    """Against the plain CPU path in float32: prompts and decode of a bf16 bundle, KL of an int8, int4 one."""
    plain = kt.load(bundles[0], dtype="float32")
    tokens = tokens_of(plain, TOKENS)
    expected = plain.logits(tokens)
    errors = {}
    for name, options in {"graphs": {}, "issued": {"graphs": False}, "streamed": {"prefill": "gpu"}}.items():
        model: Any = kt.load(bundles[0], device=device, dtype="float32", **{"prefill": "cpu", **options})
        rows = torch.cat((model.logits(tokens).cpu(), decoded(model, tokens)))
        wanted = torch.cat((expected, expected[19:]))
        errors[name] = float((rows - wanted).abs().max() / wanted.abs().max())
    quantised = kt.load(bundles[1], dtype="float32").logits(tokens)
    model = kt.load(bundles[1], device=device, prefill="cpu")
    hot: Any = kt.load(bundles[1], device=device, prefill="cpu", gpu_experts="8")
    return {
        "float32_error": max(errors.values()),
        "float32_errors": errors,
        "int8_int4_kl": median_kl(model.logits(tokens), quantised),
        "with_8_hot_int4_kl": median_kl(hot.logits(tokens), quantised),
    }


def decoded(model: Any, tokens: list[int]) -> torch.Tensor:
    cache = model.new_cache(len(tokens))
    rows = [model.prefill(tokens[:20], cache)]
    return torch.stack(rows + [model.decode(token, cache) for token in tokens[20:]]).cpu()


def median_kl(got: torch.Tensor, expected: torch.Tensor) -> float:
    log_q, log_p = got.cpu().log_softmax(-1), expected.log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).median())


def linear_times(device: str, _: list[Path]) -> dict[str, Any]:
    """Milliseconds of one int4 matrix by kind and rows, and what is chosen."""
    place = parse_devices(device)
    if place is None:
        raise SystemExit(f"{device} is no device of the hybrid path")
    where = place.torch_devices[0]
    rows, columns = SHAPE
    codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8)
    ones = torch.ones(rows, columns // 128, dtype=torch.uint8)
    parts = {"qweight": codes, "group_scale": ones, "group_zero": 8 * ones, "row_scale": torch.ones(rows)}
    matrix = LinearWeights("w", columns, "int4", parts)
    never = 1 << 30
    makers: dict[str, Callable[[], Any]] = {
        "packed": lambda: linears.PackedInt4Linear(matrix, where, torch.bfloat16, None, never),
        "packed, expanded": lambda: linears.PackedInt4Linear(matrix, where, torch.bfloat16, None, 1),
        "codes, expanded": lambda: linears.CodesLinear(matrix, where, torch.bfloat16, None, False, 1),
    }
    if versions()["triton"] and where.type == "cuda":
        makers["triton"] = lambda: linears.CodesLinear(matrix, where, torch.bfloat16, None, True, never)
    found: dict[str, Any] = {"shape": SHAPE, "layout_is_known": packed_layout(where) is not None}
    for name, make in makers.items():
        linear = make()
        found[name] = {
            str(n): milliseconds(linear, torch.ones(n, columns, device=where)) for n in LINEAR_ROWS
        }
    made: Any = linears.linear_maker(where, torch.bfloat16)(matrix, None)
    return {**found, "chosen": type(made).__name__, "expanded_from_rows": made.dense_rows}


def router_times(device: str, bundles: list[Path]) -> dict[str, Any]:
    """Milliseconds of the bundle's router by rows: torch's operations, and our kernel with Triton."""
    place = parse_devices(device)
    if place is None:
        raise SystemExit(f"{device} is no device of the hybrid path")
    where, config = place.torch_devices[0], load_manifest(bundles[0]).model
    biased = (config.router == "sigmoid_bias_groups", config.router_bias)
    router = fused_router.random_router(config, config.num_experts_per_tok, biased, where)
    kinds: dict[str, Any] = {"torch": router}
    if versions()["triton"] and where.type == "cuda":
        kinds["fused"] = fused_router.FusedRouter(router)
    found: dict[str, Any] = {"experts": config.n_routed_experts, "groups": config.n_group}
    for name, route in kinds.items():
        inputs = {rows: torch.randn(rows, config.hidden_size, device=where) for rows in ROUTED_ROWS}
        found[name] = {str(rows): milliseconds(route, x) for rows, x in inputs.items()}
    chosen: Any = fused_router.fastest_route(router)
    return {**found, "chosen": type(chosen).__name__}


def milliseconds(linear: Any, x: torch.Tensor) -> float:
    """Median of five times five calls; a simulated device, whose times mean nothing, makes one."""
    calls = 5 if x.is_cuda else 1

    def once() -> float:
        synchronize(x.device)
        start = time.perf_counter()
        for _ in range(calls):
            linear(x)
        synchronize(x.device)
        return (time.perf_counter() - start) / calls

    once()
    return round(1000 * statistics.median(once() for _ in range(calls)), 4)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def prefill(device: str, bundles: list[Path]) -> dict[str, Any]:
    """Tokens a second by policy and length; of the second of two prompts, when all buffers are there."""
    found: dict[str, Any] = {}
    for policy in ("cpu", "gpu", "auto"):
        model: Any = kt.load(bundles[0], device=device, prefill=policy)
        cache = model.new_cache(max(PROMPTS))
        found[policy] = {}
        for length in PROMPTS:
            tokens = tokens_of(model, length)
            for _ in range(2):
                cache.truncate(0)
                start = time.perf_counter()
                model.prefill(tokens, cache)
                seconds = time.perf_counter() - start
            found[policy][str(length)] = round(length / seconds, 1)
    return found


def memory(device: str, bundles: list[Path]) -> dict[str, Any]:
    """What torch's allocator held at most while a cache was filled, beside the plan's parts of it."""
    plans: list[Any] = []
    length = 2048
    model: Any = kt.load(bundles[0], device=device, prefill="gpu", cache_len=length, on_plan=plans.append)
    cache = model.new_cache(length)
    model.prefill(tokens_of(model, length - 8), cache)
    for token in range(8):
        model.decode(token, cache)
    if model.devices.is_simulated:
        return {"held_bytes": None, "note": "a simulated device has no memory of its own"}
    held = [torch.cuda.max_memory_reserved(index) for index in model.devices.cuda_indices]
    planned = [own.weight_bytes + own.cache + own.workspace + own.hot_experts for own in plans[0].vram]
    used = [total - free for free, total in map(torch.cuda.mem_get_info, model.devices.cuda_indices)]
    return {
        "held_bytes": held,
        "planned_bytes": planned,
        "off": max(abs(h / p - 1) for h, p in zip(held, planned, strict=True)),
        "used_bytes": used,
        "planned_with_allowances_bytes": [own.total for own in plans[0].vram],
    }


STAGES: dict[str, Callable[[str, list[Path]], dict[str, Any]]] = {
    "linears": linear_times,
    "logits": logits,
    "memory": memory,
    "prefill": prefill,
    "router": router_times,
}
