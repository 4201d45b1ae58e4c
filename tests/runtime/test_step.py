"""Decode in native steps against the same model without them; when a layer falls back; long prompts."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kttools_runtime import _kernels
from kttools_runtime.errors import InvalidInputError
from kttools_runtime.expert_policy import LayerPolicy
from kttools_runtime.model import Model
from kttools_runtime.moe import RoutedExperts
from tests.compare import assert_close, assert_same_distribution, mean_kl
from tests.oracle import CONFIGS, hf_model, runtime_model, text_tokens, trained_model

NAMES = ("base", "halves_rope", "yarn_two_mscales", "odd_heads")
# bf16 caches and inputs round at other places, int8 rows even more: the noise between two such paths.
STEP_KL = 1e-4
INT8_KL = 2e-3


@pytest.fixture(scope="module")
def nano(nano_checkpoint: Path) -> Any:
    return trained_model(nano_checkpoint)


@pytest.fixture(scope="module")
def text(nano_checkpoint: Path, samples_dir: Path) -> torch.Tensor:
    return text_tokens(nano_checkpoint, samples_dir / "text" / "python.jsonl", 120)


def decoded(model: Model, tokens: torch.Tensor) -> torch.Tensor:
    cache = model.new_cache(len(tokens))
    return torch.stack([model.decode(int(token), cache) for token in tokens])


def without_steps(model: Model, run: Any) -> Any:
    halves = [layer.native for layer in model.layers]
    for layer in model.layers:
        layer.native = None
    try:
        return run()
    finally:
        for layer, native in zip(model.layers, halves, strict=True):
            layer.native = native


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("experts", "linears"), [("bf16", "bf16"), ("int8", "int4")])
def test_steps_equal_modules(nano: Any, text: torch.Tensor, experts: str, linears: str, threads: int) -> None:
    model = runtime_model(nano, torch.bfloat16, experts, linears, threads=threads)
    assert all(layer.native is not None for layer in model.layers)
    native = decoded(model, text)
    plain = without_steps(model, lambda: decoded(model, text))
    assert_same_distribution(native, plain, STEP_KL if experts == "bf16" else INT8_KL)
    assert not torch.equal(native, plain)  # else the steps did not run


@pytest.mark.parametrize("name", NAMES)
def test_steps_of_every_config(name: str) -> None:
    model = runtime_model(hf_model(CONFIGS[name]), torch.bfloat16)
    tokens = torch.randint(0, model.config.vocab_size, (40,), generator=torch.Generator().manual_seed(1))
    native = decoded(model, tokens)
    assert mean_kl(native, without_steps(model, lambda: decoded(model, tokens))) < 2e-3


@pytest.mark.parametrize(("experts", "linears"), [("bf16", "bf16"), ("int8", "int4")])
def test_prefill_equals_modules(nano: Any, text: torch.Tensor, experts: str, linears: str) -> None:
    model = runtime_model(nano, torch.bfloat16, experts, linears, threads=2)
    plain = without_steps(model, lambda: model.logits(text))
    for chunk_size in (None, 50, 7):
        native = model.logits(text, chunk_size)
        assert_same_distribution(native, plain, STEP_KL if experts == "bf16" else INT8_KL)
        assert not torch.equal(native, plain)


def test_two_to_four_tokens_are_a_step_too(nano: Any, text: torch.Tensor) -> None:
    model = runtime_model(nano, torch.bfloat16)
    one = decoded(model, text)
    for chunk_size in (2, 3, 4):
        assert_same_distribution(model.logits(text, chunk_size), one, STEP_KL, what=f"{chunk_size}")


def test_the_router_makes_the_same_choices(nano: Any, text: torch.Tensor) -> None:
    """Every layer's native router on what really comes to it."""
    model = runtime_model(nano, torch.bfloat16)
    seen: dict[int, list[torch.Tensor]] = {}
    for index, moe in model.moe_layers.items():
        moe.experts = RoutedExperts(_Watching(moe.experts.layer, seen.setdefault(index, [])), torch.float32)
    model.logits(text)
    for index, moe in model.moe_layers.items():
        (x,) = seen[index]
        native = moe.router.native(_kernels.Engine(1))
        for row in x:
            ids = torch.empty(1, moe.router.num_experts, dtype=torch.int64)
            weights = torch.empty(1, moe.router.num_experts)
            native.forward(row[None].contiguous().numpy(), ids.numpy(), weights.numpy())
            expected_ids, expected = moe.router(row[None])
            assert torch.equal(ids, expected_ids)
            assert_close(weights, expected, 2**-19)


class _Watching:
    """Experts that keep their input."""

    def __init__(self, inner: Any, seen: list[torch.Tensor]) -> None:
        self.inner, self.seen = inner, seen

    def forward(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        self.seen.append(x.to(torch.float32))
        return self.inner.forward(x, ids, weights)


def test_tables_and_recorders_are_not_passed_by(nano: Any, text: torch.Tensor) -> None:
    model = runtime_model(nano, torch.bfloat16)
    plain = model.decode(5, model.new_cache(1))
    moe = next(iter(model.moe_layers.values()))
    own, seen = moe.experts, []
    moe.experts = RoutedExperts(_Watching(own.layer, seen), own.input_dtype)
    model.decode(5, model.new_cache(1))
    assert len(seen) == 1
    moe.experts = own
    moe.router.table = _DropAll()
    dropped = model.decode(5, model.new_cache(1))
    assert not torch.equal(dropped, plain)
    assert_close(dropped, without_steps(model, lambda: model.decode(5, model.new_cache(1))), 2**-6)
    moe.router.table = None
    assert torch.equal(model.decode(5, model.new_cache(1)), plain)


@pytest.mark.parametrize("num_tokens", [1, 3, 40])
def test_watching_and_keeping_all_change_no_bit(nano: Any, text: torch.Tensor, num_tokens: int) -> None:
    """Between the two parts of a native mixture stand a watcher and a table that drops nothing."""
    model = runtime_model(nano, torch.bfloat16)
    plain = model.logits(text[:num_tokens])
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    kept = _KeepAll()
    for moe in model.moe_layers.values():
        moe.watch = lambda x, ids, weights: seen.append((x, ids, weights))
        moe.router.table = kept
    assert torch.equal(model.logits(text[:num_tokens]), plain)
    assert len(seen) == len(kept.scores) == len(model.moe_layers)
    for (x, ids, weights), scores, moe in zip(seen, kept.scores, model.moe_layers.values(), strict=True):
        own = _KeepAll()
        moe.router.table = own
        expected_ids, expected = moe.router(x)
        assert torch.equal(ids, expected_ids)
        assert_close(weights, expected, 2**-19)
        assert_close(scores, own.scores[0], 2**-19)


TABLES = {
    "static": LayerPolicy(kind="static", k=3, alpha=torch.linspace(1.3, 1.0, 8)),
    "adaptive": LayerPolicy(kind="adaptive", k_max=7, threshold=0.06, alpha=torch.linspace(1.3, 1.0, 8)),
}


@pytest.mark.parametrize("num_tokens", [1, 3, 40])
@pytest.mark.parametrize("kind", TABLES)
def test_a_table_is_part_of_the_one_call(nano: Any, text: torch.Tensor, kind: str, num_tokens: int) -> None:
    """No torch rule runs; the bits are those of the rule between the step's two parts, watched or not."""
    model = runtime_model(nano, torch.bfloat16)
    text, policy = text[:num_tokens], TABLES[kind]
    plain = model.logits(text)

    def with_table(table: Any) -> torch.Tensor:
        for moe in model.moe_layers.values():
            moe.router.table = table
        return model.logits(text)

    between = with_table(_InTorch(policy))
    assert not torch.equal(between, plain)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LayerPolicy, "select", None)
        assert torch.equal(with_table(policy), between)
        seen: list[tuple[torch.Tensor, ...]] = []
        for moe in model.moe_layers.values():
            moe.watch = lambda *shown: seen.append(shown)
        assert torch.equal(model.logits(text), between)
    shape = num_tokens, 3 if kind == "static" else 8
    assert {tuple(each.shape) for shown in seen for each in shown[1:]} == {shape}
    again: list[tuple[torch.Tensor, ...]] = []
    for moe in model.moe_layers.values():
        moe.watch = lambda *shown: again.append(shown)
    with_table(_InTorch(policy))
    for shown, expected in zip(seen, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(shown, expected, strict=True))
    assert torch.equal(with_table(None), plain)


class _InTorch:
    """A table that the kernels do not know."""

    def __init__(self, policy: LayerPolicy) -> None:
        self.policy = policy

    def select(self, *choice: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.policy.select(*choice)


def test_a_table_that_does_not_fit_is_refused_every_time(nano: Any) -> None:
    model = runtime_model(nano, torch.bfloat16)
    for moe in model.moe_layers.values():
        moe.router.table = LayerPolicy(kind="adaptive", threshold=0.1)  # no k_max
    for _ in range(2):
        with pytest.raises(InvalidInputError, match="expected 1 <= k_min <= k_max, got 1 and 0"):
            model.decode(5, model.new_cache(1))


class _KeepAll:
    def __init__(self) -> None:
        self.scores: list[torch.Tensor] = []

    def select(
        self, ids: torch.Tensor, weights: torch.Tensor, scores: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.scores.append(scores)
        return ids, weights


class _DropAll:
    def select(
        self, ids: torch.Tensor, weights: torch.Tensor, scores: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full_like(ids, -1), torch.zeros_like(weights)


def test_the_reference_path_has_no_steps(nano: Any) -> None:
    assert all(layer.native is None for layer in runtime_model(nano, torch.float32).layers)


# Prints the peak of a process that prefills 8192 tokens, in one chunk or in chunks of 4096.
LONG = """
import json, sys, torch
from tests.memory import peak_rss_bytes, resident_bytes
from tests.oracle import hf_model, runtime_model
torch.set_num_threads(1)
model = runtime_model(hf_model({"max_position_embeddings": 9000}), getattr(torch, sys.argv[1]))
tokens = torch.randint(0, model.config.vocab_size, (8192,), generator=torch.Generator().manual_seed(0))
model.prefill(tokens[:512], model.new_cache(512))
before = resident_bytes()
logits = model.prefill(tokens, model.new_cache(8192), chunk_size=int(sys.argv[2]))
print(json.dumps({"grown": peak_rss_bytes() - before, "logits": logits.double().tolist()}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_long_prompts_take_bounded_memory(dtype: str, repo: Path) -> None:
    """Less than half of one [8192, 8192] float32 matrix, activations included; the same logits in chunks."""
    found = []
    for chunk_size in ("8192", "4096"):
        done = subprocess.run(
            [sys.executable, "-c", LONG, dtype, chunk_size], cwd=repo, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    assert max(run["grown"] for run in found) < 128e6, found
    whole, chunks = (torch.tensor([run["logits"]]) for run in found)
    assert mean_kl(chunks, whole) < (1e-9 if dtype == "float32" else 2e-3)
