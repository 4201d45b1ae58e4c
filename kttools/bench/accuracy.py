"""Relative L2 error of a layer against float32 on Gaussian weights, the same bits for every engine."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kttools_runtime import _kernels
from kttools_runtime.experts import ExpertEngine, pack_format

from .kt_peer import KtKernelPeer
from .layer import gaussian_expert
from .shapes import LayerShape

NUM_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Problem:
    """One batch through every expert of a small layer (num_experts == top_k), and its float32 answer."""

    shape: LayerShape
    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    expected: torch.Tensor


def relative_l2(got: torch.Tensor, expected: torch.Tensor) -> float:
    """|got - expected| / |expected|; NaN when either holds one."""
    return float(torch.linalg.vector_norm(got.double() - expected.double()) / expected.double().norm())


def problem(shape: LayerShape, seed: int = 7) -> Problem:
    """Weights ~ N(0, 1 / fan-in) in bf16, x ~ N(0, 1) in bf16, weights of the experts uniform."""
    small = LayerShape(shape.name, shape.hidden_size, shape.moe_intermediate_size, shape.top_k, shape.top_k)
    parts = [gaussian_expert(small, seed + e) for e in range(small.num_experts)]
    gate, up, down = (torch.stack([part[i] for part in parts]) for i in range(3))
    generator = torch.Generator().manual_seed(seed + 1000)  # not an expert's: x must not resemble a row
    x = torch.randn(NUM_TOKENS, shape.hidden_size, generator=generator).to(torch.bfloat16)
    ids = torch.stack([torch.randperm(small.num_experts, generator=generator) for _ in range(NUM_TOKENS)])
    weights = torch.rand(NUM_TOKENS, small.top_k, generator=generator)
    expected = torch.zeros(NUM_TOKENS, shape.hidden_size)
    for e in range(small.num_experts):
        hidden = F.silu(x.float() @ gate[e].float().T) * (x.float() @ up[e].float().T)
        expected += weights[ids == e][:, None] * (hidden @ down[e].float().T)
    return Problem(small, gate, up, down, x, ids, weights, expected)


def errors(
    engine: ExpertEngine,
    shape: LayerShape,
    format: str,
    peer: KtKernelPeer | None,
    notice: Callable[[str], None],
) -> dict[str, float]:
    """Relative L2 error by engine name; none for formats that nothing is quantised to.

    The peer is loaded with these weights and must be loaded again.
    """
    if pack_format(format) not in _kernels.FORMATS:
        return {}
    notice("accuracy against float32 on Gaussian weights")
    case = problem(shape)
    layer = engine.layer_from_tensors(case.gate, case.up, case.down, format)
    found = {"kttools": relative_l2(layer.forward(case.x, case.ids, case.weights), case.expected)}
    if peer is not None:
        weights = case.gate, case.up, case.down
        peer.load(case.shape, format, engine.threads, NUM_TOKENS, weights)
        found[peer.name] = relative_l2(peer.forward(case.x, case.ids, case.weights), case.expected)
    return found
