"""The router's choice in one kernel: scores, bias, groups, the best, their weights. Triton; CUDA only.

torch needs a dozen small kernels for 256 numbers. Ours is taken after a check on the device itself: its
answer to random input is torch's, and it is faster. With an expert table torch's path remains. Not measured
on a GPU.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kttools_runtime.config import ModelConfig
from kttools_runtime.routing import NORM_EPS, Router, make_router

from .triton_kernels import has_triton

Route = Callable[[Tensor], tuple[Tensor, Tensor]]
CHECKED_ROWS = 512
TIMED_CALLS = 20
TOL = 1e-6  # of a weight; sums of at most 512 float32 of one sign
MOST_TIES = 0.01  # of rows whose choice may differ: two scores that rounding swaps


class FusedRouter:
    """Route of one layer; x [T, hidden_size] float32 -> ids int64 and weights float32, both [T, k]."""

    __slots__ = ("router",)

    def __init__(self, router: Router) -> None:
        self.router = router

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        router = self.router
        if router.table is not None:
            return router(x)
        logits = functional.linear(x, router.weight, router.logit_bias)
        return route(router.config, logits, router.bias, router.num_experts)


def route(config: ModelConfig, logits: Tensor, bias: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """logits float32 [T, n_routed_experts] -> ids int64 and weights float32 [T, k]; bias: see Router.

    Of experts with the same score the first is better.
    """
    tokens, count = logits.shape
    ids = torch.empty(tokens, k, dtype=torch.int64, device=logits.device)
    weights = torch.empty(tokens, k, dtype=torch.float32, device=logits.device)
    if tokens:
        _kernel()[(tokens,)](
            logits.contiguous(),
            logits if bias is None else bias,
            ids,
            weights,
            config.routed_scaling_factor,
            **constants(config, count, k),
        )
    return ids, weights


def constants(config: ModelConfig, count: int, k: int) -> dict[str, Any]:
    """What a kernel is compiled for. count: n_routed_experts."""
    size = count // config.n_group
    return {
        "NUM_GROUPS": config.n_group,
        "GROUP_SIZE": size,
        "KEPT_GROUPS": config.topk_group,
        "K": k,
        "IS_SIGMOID": config.router == "sigmoid_bias_groups",
        "IS_NORMALISED": config.norm_topk_prob,
        "GROUPS": _power_of_two(config.n_group),
        "SIZE": _power_of_two(size),
        "PLACES": _power_of_two(k),
        "EPS": NORM_EPS,
    }


def fastest_route(router: Router) -> Route:
    """Ours where it is right and faster on the router's device, torch's elsewhere."""
    device = router.weight.device
    if device.type != "cuda" or not has_triton():
        return router
    biased = tuple(part is not None for part in (router.bias, router.logit_bias))
    return FusedRouter(router) if _is_better(router.config, router.num_experts, biased, device) else router


@functools.lru_cache(maxsize=8)
def _is_better(config: ModelConfig, k: int, biased: tuple[bool, bool], device: torch.device) -> bool:
    """Once a process for the layers of a model on a device: they differ in weights alone."""
    router = random_router(config, k, biased, device)
    fused = FusedRouter(router)
    x = torch.randn(CHECKED_ROWS, config.hidden_size, generator=torch.Generator().manual_seed(1)).to(device)
    if not agrees(fused(x), router(x)):
        return False
    return milliseconds(fused, x[:1]) < milliseconds(router, x[:1])


def random_router(config: ModelConfig, k: int, biased: tuple[bool, bool], device: torch.device) -> Router:
    """A router of this kind with logits of about 1. biased: has a bias, has one of its logits."""
    generator = torch.Generator().manual_seed(0)
    count, hidden = config.n_routed_experts, config.hidden_size
    weight = torch.randn(count, hidden, generator=generator) / hidden**0.5
    bias, logit_bias = (
        (torch.randn(count, generator=generator) / 8).to(device) if is_there else None for is_there in biased
    )
    return make_router(config, weight.to(device), bias, k, logit_bias)


def agrees(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> bool:
    """The same ids but for MOST_TIES of the rows, and there the same weights."""
    is_same = (ours[0] == theirs[0]).all(dim=1)
    if float(is_same.float().mean()) < 1 - MOST_TIES:
        return False
    largest = theirs[1].abs().amax()
    return bool(((ours[1] - theirs[1])[is_same].abs() <= TOL * largest).all())


def milliseconds(work: Route, x: Tensor) -> float:
    """Of a call on CUDA, by events around TIMED_CALLS."""
    for _ in range(3):
        work(x)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(TIMED_CALLS):
        work(x)
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / TIMED_CALLS


def _power_of_two(count: int) -> int:
    return 1 << max(0, count - 1).bit_length()


@functools.cache
def _kernel() -> Any:
    """The kernel, made when it is first needed."""
    import triton

    from . import router_source

    return triton.jit(router_source.route_kernel)
