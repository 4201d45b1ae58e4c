"""The native half of a layer with grouped-query attention, against plain attention in float64."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kttools_runtime import _kernels
from tests.compare import assert_close
from tests.engine.test_steps import bf16, norm_args, normed, rounded, seeded

HIDDEN = 40
PART = 512  # keys that are attended to by themselves (kPartKeys)


@dataclass(frozen=True)
class Case:
    """One attention half with random weights: sizes, what goes in, and what the family has beyond them."""

    heads: int
    kv_heads: int
    dim: int
    rope: int
    x: Tensor
    cache: Tensor  # [start + rows, 2 kv_heads dim] bf16; the last rows are written
    rotations: Tensor
    weights: dict[str, Tensor]
    window: int | None = None
    is_stacked: bool = True

    @property
    def start(self) -> int:
        return self.cache.shape[0] - self.x.shape[0]

    @property
    def scale(self) -> float:
        return self.dim**-0.5

    def turned(self, projected: Tensor, heads: int, norm: str) -> Tensor:
        """[rows, heads, dim] normed and rotated in pairs."""
        rows = projected.reshape(len(self.x), heads, self.dim)
        if norm in self.weights:
            rows = normed(rows, self.weights[norm])
        pairs = rows[..., : self.rope].reshape(len(self.x), heads, -1, 2).contiguous()
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * self.rotations[:, None]).flatten(2)
        return torch.cat((rotated, rows[..., self.rope :]), -1)

    def expected(self) -> tuple[Tensor, Tensor]:
        """What the half adds to x, and the rows that it writes to the cache; float64."""
        w, rows, end = self.weights, len(self.x), len(self.cache)
        projected = normed(self.x.double(), w["norm"]) @ rounded(w["inputs"]).T
        projected = projected + w.get("input_bias", torch.zeros(1)).double()
        sizes = [self.heads * self.dim, self.kv_heads * self.dim, self.kv_heads * self.dim]
        query, key, value = projected.split(sizes, -1)
        query = self.turned(query, self.heads, "q_norm")
        written = torch.cat((self.turned(key, self.kv_heads, "k_norm").flatten(1), value), -1)
        context = torch.cat((self.cache[: self.start].double(), rounded(written)))
        keys, values = context.reshape(end, 2, self.kv_heads, self.dim).unbind(1)
        keys, values = (side.repeat_interleave(self.heads // self.kv_heads, 1) for side in (keys, values))
        scores = torch.einsum("thd,shd->hts", query, keys) * self.scale
        positions = self.start + torch.arange(rows)[:, None] - torch.arange(end)
        is_hidden = (positions < 0) | (positions >= (self.window or end))
        scores = scores.masked_fill(is_hidden, -torch.inf)
        if "sinks" in w:
            sinks = w["sinks"].double()[:, None, None].expand(-1, rows, 1)
            chances = torch.cat((scores, sinks), -1).softmax(-1)[..., :-1]
        else:
            chances = scores.softmax(-1)
        attended = torch.einsum("hts,shd->thd", chances, values).reshape(rows, -1)
        out = attended @ rounded(w["out"]).T + w.get("out_bias", torch.zeros(1)).double()
        return out, written

    def arguments(self, engine: Any) -> dict[str, Any]:
        w, keys = self.weights, self.kv_heads * self.dim
        parts = [w["inputs"]] if self.is_stacked else w["inputs"].split([self.heads * self.dim, keys, keys])
        arguments = {"heads": self.heads, "kv_heads": self.kv_heads, "dim": self.dim, "rope": self.rope}
        arguments |= {"window": self.window, "softmax_scale": self.scale, "norm": norm_args(w["norm"])}
        arguments["inputs"] = [_kernels.PackedLinear.from_bf16(engine, bf16(part)) for part in parts]
        arguments["out"] = _kernels.PackedLinear.from_bf16(engine, bf16(w["out"]))
        arguments |= {name: norm_args(w[name]) for name in ("q_norm", "k_norm") if name in w}
        return arguments | {n: w[n].numpy() for n in ("input_bias", "out_bias", "sinks") if n in w}

    def run(self, threads: int = 2, isa: str = "") -> tuple[Tensor, Tensor]:
        """What the step adds to x, and the cache after it."""
        engine = _kernels.Engine(threads, isa)
        step = _kernels.GqaStep(engine, **self.arguments(engine))
        got, cache = self.x.clone(), self.cache.clone()
        pairs = torch.view_as_real(self.rotations).flatten(1).float().numpy()
        step.forward(got.numpy(), pairs, cache.view(torch.uint16).numpy(), self.start)
        return got - self.x, cache


def make_case(
    sizes: tuple[int, int, int, int], start: int, rows: int, extras: str = "", window: int | None = None
) -> Case:
    """extras: words out of bias, norm, sinks, apart."""
    heads, kv_heads, dim, rope = sizes
    make, queries, projected = seeded(heads + start), heads * dim, (heads + 2 * kv_heads) * dim
    w = {
        "norm": make(HIDDEN),
        "inputs": make(projected, HIDDEN) / HIDDEN**0.5,
        "out": make(HIDDEN, queries) / queries**0.5,
    }
    if "bias" in extras:
        w |= {"input_bias": make(projected), "out_bias": make(HIDDEN)}
    if "norm" in extras:
        w |= {"q_norm": make(dim), "k_norm": make(dim)}
    if "sinks" in extras:
        w["sinks"] = 2 * make(heads)
    cache = make(start + rows, 2 * kv_heads * dim).to(torch.bfloat16)
    angles = make(rows, rope // 2).double()
    rotations = torch.polar(torch.ones_like(angles), angles)
    x = make(rows, HIDDEN)
    return Case(heads, kv_heads, dim, rope, x, cache, rotations, w, window, "apart" not in extras)


def check(case: Case, isa: str) -> None:
    expected, written = case.expected()
    got, cache = case.run(isa=isa)
    # The cache is bf16: half a unit is at most 2^-8 of a number, and seldom rounds the other way.
    assert_close(cache[case.start :], written, 2**-8 * (1 + 2**-10))
    assert torch.equal(cache[: case.start], case.cache[: case.start])
    # The matrix unit wants queries and powers in bf16, too: half a unit of each, and logits reach some units.
    rounds = isa == "amx" and case.dim % 32 == 0
    assert_close(got, expected, 2**-7 if rounds else 2**-9)


# Heads and extras of the families (half of a head of GLM-4.5 is rotated); odd counts and sizes, one key head.
SHAPES = {
    "qwen3": ((16, 2, 128, 128), "norm"),
    "qwen2": ((14, 2, 64, 64), "bias apart"),
    "mixtral": ((8, 2, 128, 128), ""),
    "glm4": ((12, 1, 128, 64), "bias norm"),
    "gpt_oss": ((8, 1, 64, 64), "bias sinks"),
    "odd": ((15, 5, 23, 6), "bias norm sinks apart"),
    "one_key_head": ((7, 1, 10, 10), "sinks"),
    "all_heads": ((3, 3, 33, 2), "norm apart"),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(
    ("start", "rows", "window"), [(0, 1, None), (37, 4, None), (0, 4, 3), (700, 3, None), (1200, 4, 600)]
)
def test_gqa_step(isa: str, name: str, start: int, rows: int, window: int | None) -> None:
    sizes, extras = SHAPES[name]
    check(make_case(sizes, start, rows, extras, window), isa)


@pytest.mark.parametrize("start", [PART - 2, PART - 1, PART, 2 * PART - 1])
@pytest.mark.parametrize("window", [None, 1, PART, PART + 1])
@pytest.mark.parametrize("dim", [24, 32])
def test_ends_of_parts(isa: str, start: int, window: int | None, dim: int) -> None:
    check(make_case((6, 2, dim, 8), start, 3, "sinks", window), isa)


@pytest.mark.parametrize("seed", range(20))
def test_random_sizes(isa: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    kv_heads, dim = int(rng.integers(1, 6)), int(rng.integers(2, 70) if seed % 2 else 32 * rng.integers(1, 6))
    sizes = (kv_heads * int(rng.integers(1, 40)), kv_heads, dim, 2 * int(rng.integers(1, dim // 2 + 1)))
    extras = " ".join(word for word in ("bias", "norm", "sinks", "apart") if rng.integers(2))
    window = int(rng.integers(1, 900)) if rng.integers(2) else None
    check(make_case(sizes, int(rng.integers(0, 1300)), int(rng.integers(1, 5)), extras, window), isa)


@pytest.mark.parametrize("dim", [48, 64])
def test_same_bits_for_any_number_of_threads(isa: str, dim: int) -> None:
    case = make_case((12, 3, dim, 16), 1700, 3, "bias norm sinks", 1400)
    first, *others = (case.run(threads, isa) for threads in (1, 2, 3, 7))
    for got, cache in others:
        assert torch.equal(got, first[0])
        assert torch.equal(cache.view(torch.uint16), first[1].view(torch.uint16))


def test_rows_together_are_rows_one_by_one() -> None:
    """Each row sees what the rows before it wrote, and nothing after it."""
    case = make_case((6, 2, 32, 32), 600, 4, "norm", 300)
    together, cache = case.run()
    for r in range(4):
        rows = cache[: case.start + r + 1].clone()
        one = replace(case, x=case.x[r : r + 1], rotations=case.rotations[r : r + 1], cache=rows)
        assert torch.equal(one.run()[0], together[r : r + 1])


def test_numbers_that_are_none_stay() -> None:
    case = make_case((4, 2, 16, 16), 10, 1, "sinks")
    case.x[0, 3] = torch.nan
    assert torch.isnan(case.run()[0]).all()


def test_what_does_not_fit_is_refused() -> None:
    case, engine = make_case((6, 2, 16, 8), 5, 2, "bias norm sinks"), _kernels.Engine(1)
    good = case.arguments(engine)
    linear = _kernels.PackedLinear.from_bf16(engine, bf16(torch.ones(HIDDEN, 7)))
    vector = np.ones(7, np.float32)
    for change, message in (
        ({"kv_heads": 4}, "divide the heads"),
        ({"rope": 7}, "rotary part"),
        ({"rope": 18}, "rotary part"),
        ({"rope": 0}, "rope must be 1"),
        ({"window": 0}, "window must be 1"),
        ({"inputs": []}, "one input matrix or three"),
        ({"inputs": [linear]}, "inputs of an input matrix"),
        ({"inputs": good["inputs"] * 3}, "outputs of an input matrix"),
        ({"dim": 8}, "outputs of an input matrix"),
        ({"out": linear}, "sizes of o_proj"),
        ({"q_norm": norm_args(torch.ones(7))}, "size of a head's norm"),
        ({"k_norm": norm_args(torch.ones(7))}, "size of a head's norm"),
        ({"input_bias": vector}, "size of the input bias"),
        ({"out_bias": vector}, "size of the output bias"),
        ({"sinks": vector}, "number of sinks"),
        ({"sinks": np.ones(6)}, "sinks must be float32"),
    ):
        with pytest.raises(ValueError, match=message):
            _kernels.GqaStep(engine, **(good | change))
    step = _kernels.GqaStep(engine, **good)
    assert not step.takes_many
    hidden, pairs = case.x.numpy(), np.zeros((2, 8), np.float32)
    cache = case.cache.view(torch.uint16).numpy()
    for arguments, message in (
        ((hidden, pairs, cache, 6), "do not fit a cache of 7"),
        ((hidden, pairs, cache, -1), "do not fit a cache"),
        ((hidden, pairs[:1], cache, 0), "rotations has shape"),
        ((hidden, pairs, cache[:, :-1], 0), "cache must be C-contiguous"),
        ((hidden, pairs, cache[0], 0), "cache must have 2 dimensions"),
        ((np.zeros((5, HIDDEN), np.float32), pairs, cache, 0), "at most 4 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            step.forward(*arguments)
