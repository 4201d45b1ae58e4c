"""The native halves of a layer: router, norm, gated MLP and attention against torch in float64."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kttools_runtime import _kernels
from kttools_runtime.config import ModelConfig
from kttools_runtime.routing import make_router
from tests.compare import assert_close
from tests.runtime.test_config import VALUES

EPS = 1e-6


def seeded(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator)


def bf16(x: Tensor) -> Any:
    return x.to(torch.bfloat16).view(torch.uint16).numpy()


def rounded(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).to(torch.float64)


def norm_args(weight: Tensor) -> tuple[Any, float]:
    n = weight.numel()
    return (weight * n**0.5).numpy(), EPS * n


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.double()


def close(got: Any, expected: Tensor, terms: int) -> None:
    """Sums of `terms` float32 products: roundings of half a unit of the largest, added as a random walk."""
    assert_close(torch.as_tensor(got), expected, terms**0.5 * 2**-21)


def router_config(kind: str, experts: int, groups: int, kept: int, k: int, normalise: bool) -> ModelConfig:
    values = VALUES | {
        "router": kind,
        "n_routed_experts": experts,
        "n_group": groups,
        "topk_group": kept,
        "num_experts_per_tok": k,
        "norm_topk_prob": normalise,
    }
    return ModelConfig.from_dict(values)


@pytest.mark.parametrize("kind", ["sigmoid_bias_groups", "softmax_groups"])
@pytest.mark.parametrize(
    ("experts", "groups", "kept", "k", "normalise"),
    [(256, 8, 4, 8, True), (64, 8, 4, 8, True), (12, 3, 2, 5, False), (20, 1, 1, 6, True)],
)
@pytest.mark.parametrize("is_bf16", [True, False])
def test_router_chooses_as_torch_does(
    kind: str, experts: int, groups: int, kept: int, k: int, normalise: bool, is_bf16: bool
) -> None:
    config = router_config(kind, experts, groups, kept, k, normalise)
    make = seeded(experts + k)
    weight = make(experts, config.hidden_size) / config.hidden_size**0.5
    if is_bf16:
        weight = weight.to(torch.bfloat16).to(torch.float32)
    bias = make(experts) * 0.1 if kind == "sigmoid_bias_groups" else None
    router = make_router(config, weight, bias)
    native = router.native(_kernels.Engine(2))
    for rows in (*[4] * 50, 5, 100):
        x = make(rows, config.hidden_size)
        expected_ids, expected = router(x)
        ids, weights = np.empty((rows, k), np.int64), np.empty((rows, k), np.float32)
        native.forward(x.numpy(), ids, weights)
        assert torch.equal(torch.from_numpy(ids), expected_ids)
        # exp and sums in another order: a few units in the last place
        assert_close(torch.from_numpy(weights), expected, 2**-19)


def test_router_takes_the_lower_of_equals_and_sees_nan() -> None:
    config = router_config("sigmoid_bias_groups", 12, 3, 2, 3, True)
    router = make_router(config, torch.zeros(12, config.hidden_size), torch.zeros(12))
    native = router.native(_kernels.Engine(1))
    ids, weights = np.empty((1, 3), np.int64), np.empty((1, 3), np.float32)
    x = np.ones((1, config.hidden_size), np.float32)
    native.forward(x, ids, weights)
    assert ids.tolist() == [[0, 1, 2]]
    x[0, 0] = np.nan
    native.forward(x, ids, weights)
    assert ((ids >= 0) & (ids < 12)).all()
    assert np.isnan(weights).all()


@pytest.mark.parametrize(("hidden", "inner"), [(64, 96), (33, 17), (7, 5)])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("is_split", [False, True])
def test_dense_step(hidden: int, inner: int, rows: int, is_split: bool) -> None:
    make = seeded(hidden)
    gate, up = (make(inner, hidden) / hidden**0.5 for _ in range(2))
    down, weight, x = make(hidden, inner) / inner**0.5, make(hidden), make(rows, hidden)
    engine = _kernels.Engine(2)
    parts = [gate, up] if is_split else [torch.cat((gate, up))]
    matrices = [_kernels.PackedLinear.from_bf16(engine, bf16(part)) for part in parts]
    step = _kernels.DenseStep(
        engine, norm_args(weight), matrices, _kernels.PackedLinear.from_bf16(engine, bf16(down))
    )
    got = x.clone()
    step.forward(got.numpy())
    row = normed(x.double(), weight)
    both = torch.nn.functional.silu(row @ rounded(gate).T) * (row @ rounded(up).T)
    close(got, x.double() + both @ rounded(down).T, hidden + inner)


@pytest.mark.parametrize("rows", [5, 70])
def test_dense_step_with_many_rows_may_round_them(isa: str, rows: int) -> None:
    make, hidden, inner = seeded(rows), 96, 160
    gate, up = (make(inner, hidden) / hidden**0.5 for _ in range(2))
    down, weight, x = make(hidden, inner) / inner**0.5, make(hidden), make(rows, hidden)
    engine = _kernels.Engine(2, isa)
    both = _kernels.PackedLinear.from_bf16(engine, bf16(torch.cat((gate, up))))
    step = _kernels.DenseStep(
        engine, norm_args(weight), [both], _kernels.PackedLinear.from_bf16(engine, bf16(down))
    )
    got = x.clone()
    step.forward(got.numpy())
    row = normed(x.double(), weight)
    product = torch.nn.functional.silu(row @ rounded(gate).T) * (row @ rounded(up).T)
    # Two roundings to bf16, of the normed and of the inner rows.
    assert_close(got - x, product @ rounded(down).T, 2**-8)


def attention_reference(
    x: Tensor, cache: Tensor, start: int, rotations: Tensor, w: dict[str, Tensor], scale: float
) -> tuple[Tensor, Tensor]:
    """Plain multi-head attention over expanded keys and values, float64; the rows written to the cache."""
    heads, nope, latent = w["uk"].shape
    value, rope = w["uv"].shape[1], rotations.shape[-1] * 2
    row = normed(x, w["norm"])
    projected = row @ rounded(w["inputs"]).T
    query, compressed = projected[:, : -(latent + rope)], projected[:, -(latent + rope) :]
    if "q_b" in w:
        query = normed(query, w["q_norm"]) @ rounded(w["q_b"]).T
    query = query.reshape(len(x), heads, nope + rope)
    turned = torch.view_as_complex(query[..., nope:].reshape(len(x), heads, -1, 2) + 0) * rotations[:, None]
    query = torch.cat((query[..., :nope], torch.view_as_real(turned).flatten(2)), -1)
    key = torch.view_as_complex(compressed[:, latent:].reshape(len(x), -1, 2) + 0) * rotations
    rows = torch.cat((normed(compressed[:, :latent], w["kv_norm"]), torch.view_as_real(key).flatten(1)), -1)
    context = torch.cat((cache[:start].double(), rounded(rows)))
    keys = torch.einsum("tl,hnl->thn", context[:, :latent], rounded(w["uk"]))
    keys = torch.cat((keys, context[:, None, latent:].expand(-1, heads, -1)), -1)
    values = torch.einsum("tl,hvl->thv", context[:, :latent], rounded(w["uv"]))
    scores = torch.einsum("thd,shd->hts", query, keys) * scale
    hidden_from = torch.ones(len(x), len(context), dtype=torch.bool).triu_(start + 1)
    probabilities = scores.masked_fill(hidden_from, -torch.inf).softmax(-1)
    attended = torch.einsum("hts,shv->thv", probabilities, values).reshape(len(x), heads * value)
    return x + attended @ rounded(w["out"]).T, rows


@dataclass(frozen=True)
class Case:
    """One attention half with random weights: what goes in, and what comes out in float64."""

    sizes: tuple[int, int, int, int, int]  # heads, nope, rope, value, latent
    x: Tensor
    cache: Tensor
    rotations: Tensor
    weights: dict[str, Tensor]

    @property
    def scale(self) -> float:
        return (self.sizes[1] + self.sizes[2]) ** -0.5

    @property
    def start(self) -> int:
        return self.cache.shape[0] - self.x.shape[0]

    def expected(self) -> tuple[Tensor, Tensor]:
        return attention_reference(
            self.x.double(), self.cache, self.start, self.rotations, self.weights, self.scale
        )

    def step(self, engine: Any) -> Any:
        w = self.weights
        pack = {
            name: _kernels.PackedLinear.from_bf16(engine, bf16(w[name]))
            for name in ("inputs", "q_b", "out")
            if name in w
        }
        return _kernels.LatentStep(
            engine,
            self.sizes[2],
            self.scale,
            norm_args(w["norm"]),
            [pack["inputs"]],
            norm_args(w["q_norm"]) if "q_norm" in w else None,
            pack.get("q_b"),
            norm_args(w["kv_norm"]),
            bf16(w["uk"]),
            bf16(w["uv"]),
            pack["out"],
        )

    def run(self, step: Any) -> tuple[Tensor, Tensor]:
        """What the step adds to x, and the cache after it."""
        got, cache = self.x.clone(), self.cache.clone()
        pairs = torch.view_as_real(self.rotations).flatten(1).float().numpy()
        step.forward(got.numpy(), pairs, cache.view(torch.uint16).numpy(), self.start)
        return got - self.x, cache


def attention_case(sizes: tuple[int, int, int, int, int], rank: int | None, start: int, rows: int) -> Case:
    heads, nope, rope, value, latent = sizes
    make, hidden, query = seeded(heads + start), 40, heads * (nope + rope)
    w = {
        "norm": make(hidden),
        "kv_norm": make(latent),
        "inputs": make((rank or query) + latent + rope, hidden) / hidden**0.5,
        "uk": make(heads, nope, latent) / latent**0.5,
        "uv": make(heads, value, latent) / latent**0.5,
        "out": make(hidden, heads * value) / (heads * value) ** 0.5,
    }
    if rank:
        w |= {"q_norm": make(rank), "q_b": make(query, rank) / rank**0.5}
    cache = make(start + rows, latent + rope).to(torch.bfloat16)
    angles = make(rows, rope // 2).double()
    return Case(sizes, make(rows, hidden), cache, torch.polar(torch.ones_like(angles), angles), w)


@pytest.mark.parametrize(
    ("sizes", "rank"),
    [((6, 64, 32, 64, 128), 48), ((3, 7, 4, 5, 18), None), ((9, 16, 8, 24, 33), 20), ((1, 3, 2, 3, 5), None)],
)
@pytest.mark.parametrize("start", [0, 1, 37])
@pytest.mark.parametrize("rows", [1, 4])
def test_attention_step(
    sizes: tuple[int, int, int, int, int], rank: int | None, start: int, rows: int
) -> None:
    case = attention_case(sizes, rank, start, rows)
    expected, written = case.expected()
    got, cache = case.run(case.step(_kernels.Engine(1 + sizes[0] % 2)))
    # The cache is bf16: half a unit is at most 2^-8 of a number, and seldom rounds the other way.
    assert_close(cache[start:], written, 2**-8 * (1 + 2**-10))
    assert_close(got, expected - case.x, 2**-9)


def prefilling(case: Case, isa: str, threads: int = 2) -> Any:
    step = case.step(_kernels.Engine(threads, isa))
    if isa == "amx":
        assert step.takes_many
    if not step.takes_many:
        pytest.skip(f"{isa} has no attention kernel for many tokens: torch does it")
    return step


@pytest.mark.parametrize(
    ("sizes", "rank"),
    [((6, 64, 32, 64, 128), 48), ((2, 128, 64, 128, 512), None), ((1, 32, 32, 96, 64), 20)],
)
@pytest.mark.parametrize(
    ("start", "rows"), [(0, 5), (0, 33), (7, 250), (255, 8), (256, 32), (700, 129), (3, 1100)]
)
def test_attention_step_of_many_tokens(
    isa: str, sizes: tuple[int, int, int, int, int], rank: int | None, start: int, rows: int
) -> None:
    case = attention_case(sizes, rank, start, rows)
    step = prefilling(case, isa)
    expected, written = case.expected()
    got, cache = case.run(step)
    # Rows, queries, keys, values and probabilities are bf16.
    assert_close(cache[start:], written, 2**-6)
    assert_close(got, expected - case.x, 2**-6)


def test_attention_of_many_tokens_is_the_same_for_any_number_of_threads(isa: str) -> None:
    case = attention_case((5, 64, 32, 64, 128), 48, 21, 140)
    results = [case.run(prefilling(case, isa, threads)) for threads in (1, 2, 3, 7)]
    for got, cache in results[1:]:
        assert torch.equal(got, results[0][0])
        assert torch.equal(cache.view(torch.uint16), results[0][1].view(torch.uint16))


def test_a_later_token_changes_nothing_before_it(isa: str) -> None:
    case = attention_case((3, 64, 32, 64, 128), None, 10, 60)
    step = prefilling(case, isa)
    other = replace(case, x=torch.cat((case.x[:41], -case.x[41:])))
    got, changed = case.run(step)[0], other.run(step)[0]
    assert torch.equal(got[:41], changed[:41])
    assert not torch.equal(got[41:], changed[41:])


def test_sizes_without_a_kernel_are_refused_for_many_tokens() -> None:
    case = attention_case((3, 7, 4, 5, 18), None, 0, 5)
    step = case.step(_kernels.Engine(1))
    assert not step.takes_many
    with pytest.raises(ValueError, match="more than 4 tokens"):
        case.run(step)


def refuse(message: str, call: Callable[..., Any], *args: Any, **named: Any) -> None:
    with pytest.raises(ValueError, match=message):
        call(*args, **named)


def test_what_does_not_fit_is_refused() -> None:
    engine, make = _kernels.Engine(1), seeded(0)
    linear = {
        (n, k): _kernels.PackedLinear.from_bf16(engine, bf16(make(n, k)))
        for n, k in ((32, 8), (8, 16), (8, 8), (22, 8))
    }
    norm = norm_args(torch.ones(8))
    refuse("gate and up: expected 16", _kernels.DenseStep, engine, norm, [linear[8, 8]], linear[8, 8])
    refuse("expected one or two matrices", _kernels.DenseStep, engine, norm, [], linear[8, 8])
    step = _kernels.DenseStep(engine, norm, [linear[32, 8]], linear[8, 16])
    for hidden, message in (
        (np.zeros((0, 8), np.float32), "tokens must be 1 to 1048576, got 0"),
        (np.zeros((1, 9), np.float32), "expected 8 in dimension 1"),
        (np.zeros((1, 8), np.float64), "hidden must be float32"),
        (np.zeros((1, 16), np.float32)[:, ::2], "C-contiguous"),
    ):
        refuse(message, step.forward, hidden)
    route = ("sigmoid_bias_groups", 3, 2)
    weight = np.zeros((12, 8), np.float32)
    refuse("cannot choose 9 of 12 experts", _kernels.Router, engine, *route, 9, True, 1.0, weight)
    refuse("in 2 of 5 groups", _kernels.Router, engine, "softmax_groups", 5, 2, 2, True, 1.0, weight)
    refuse("unknown router x", _kernels.Router, engine, "x", 3, 2, 2, True, 1.0, weight)
    up = [bf16(make(2, 3, 4)), bf16(make(2, 5, 4))]
    attention: dict[str, Any] = {
        "rope": 2,
        "softmax_scale": 1.0,
        "norm": norm,
        "kv_norm": norm_args(torch.ones(4)),
    }
    more: dict[str, Any] = {"q_norm": None, "q_b": None, "up_key": up[0], "up_value": up[1]}
    out = _kernels.PackedLinear.from_bf16(engine, bf16(make(8, 10)))
    inputs = _kernels.PackedLinear.from_bf16(engine, bf16(make(16, 8)))
    refuse(
        "outputs of the inputs",
        _kernels.LatentStep,
        engine,
        inputs=[linear[22, 8]],
        out=out,
        **attention,
        **more,
    )
    refuse(
        "inputs of o_proj",
        _kernels.LatentStep,
        engine,
        inputs=[inputs],
        out=linear[8, 8],
        **attention,
        **more,
    )
    latent = _kernels.LatentStep(engine, inputs=[inputs], out=out, **attention, **more)
    hidden, turns = np.zeros((2, 8), np.float32), np.zeros((2, 2), np.float32)
    for start in (-1, 2, 3):
        refuse("do not fit a cache of 3", latent.forward, hidden, turns, np.zeros((3, 6), np.uint16), start)
    refuse("cache has shape", latent.forward, hidden, turns, np.zeros((3, 5), np.uint16), 0)
    refuse("rotations has shape", latent.forward, hidden, turns[:1], np.zeros((3, 6), np.uint16), 0)
