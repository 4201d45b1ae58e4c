"""The device path on simulated devices gives the logits of the plain path, whatever is switched on.

Oracle: the plain CPU path in float32 on a bf16 bundle, itself held against transformers (test_families). With
float32 activations only the order of sums differs: 1e-4 on logits of about 10. Single tokens go through
submit, sync and, from the third of a size on, a replayed graph.
"""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import kttools_runtime as kt
from kttools_runtime.errors import HardwareError, UsageError
from kttools_runtime.hybrid import decode
from kttools_runtime.hybrid.devices import parse_devices
from kttools_runtime.hybrid.model import HybridModel
from tests.compare import assert_close
from tests.conftest import quantize as quantize_cli
from tests.family_oracle import FIRST_CASES, hf_model, quantize, save, tokens_for

TOL = 1e-4
PATHS = [*FIRST_CASES, ("gpt_oss", "gate"), ("qwen3_moe", "window"), ("glm4_moe", "yarn")]
OPTIONS: dict[str, dict[str, Any]] = {
    "one": {"device": "cpu:0"},
    "two": {"device": "cpu:0,cpu:1"},
    "three_by_name": {"device": "cpu,cpu,cpu"},
    "no_graphs": {"device": "cpu:0", "graphs": False},
    "hot": {"device": "cpu:0,cpu:1", "gpu_experts": "3"},
    "all_hot": {"device": "cpu:0", "gpu_experts": "32"},
    "streamed": {"device": "cpu:0", "prefill": "gpu"},
    "hot_and_streamed": {"device": "cpu,cpu", "gpu_experts": "5", "prefill": "gpu"},
}


def decoded(model: Any, tokens: torch.Tensor, prompt: int) -> torch.Tensor:
    """float32 [T - prompt + 1, vocab]: after the prompt, then after each further token."""
    cache = model.new_cache(len(tokens))
    rows = [model.prefill(tokens[:prompt], cache)]
    rows += [model.decode(token, cache) for token in tokens[prompt:].tolist()]
    return torch.stack(rows)


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """families(family, case) -> (bundle, tokens, plain float32 logits); made once."""

    @cache
    def made(family: str, case: str) -> tuple[Path, torch.Tensor, torch.Tensor]:
        directory = tmp_path_factory.mktemp(f"{family}-{case}")
        hf = hf_model(family, case)
        bundle = quantize(save(hf, directory / "checkpoint"), directory / "bundle")
        tokens = tokens_for(hf, 60)
        plain = kt.load(bundle, dtype="float32", threads=1, expert_table="none")
        return bundle, tokens, plain.logits(tokens)

    return made


@pytest.mark.parametrize(("family", "case"), PATHS)
def test_every_family(families: Any, family: str, case: str) -> None:
    bundle, tokens, expected = families(family, case)
    options: dict[str, Any] = {"device": "cpu,cpu", "dtype": "float32", "threads": 1}
    model = kt.load(bundle, **options, gpu_experts="2", prefill="gpu" if family == "gpt_oss" else "cpu")
    assert isinstance(model, HybridModel)
    assert_close(model.logits(tokens), expected, TOL)
    assert_close(decoded(model, tokens, 20), expected[19:], TOL)


@pytest.fixture(scope="module")
def plain(nano_bundle_bf16: Path) -> Any:
    """The sample model's float32 logits, and 24 of its tokens."""
    model = kt.load(nano_bundle_bf16, dtype="float32", threads=1)
    tokens = torch.randint(0, model.config.vocab_size, (24,), generator=torch.Generator().manual_seed(3))
    return tokens, model.logits(tokens)


@pytest.mark.parametrize("name", OPTIONS)
def test_options_change_nothing(
    name: str, nano_bundle_bf16: Path, plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tokens, expected = plain
    model = kt.load(nano_bundle_bf16, dtype="float32", threads=2, **{"prefill": "auto", **OPTIONS[name]})
    assert_close(model.logits(tokens), expected, TOL)
    assert_close(decoded(model, tokens, 9), expected[8:], TOL)


def test_cache_is_reused_and_cut(nano_bundle_bf16: Path, plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A captured step serves another text on the same cache, and graphs of several sizes."""
    monkeypatch.setattr(decode, "SEEN_TOKENS", 8)
    tokens, expected = plain
    model = kt.load(nano_bundle_bf16, device="cpu:0", dtype="float32", threads=1)
    cache = model.new_cache(100)
    for token in range(40):
        last = model.decode(token, cache)
    assert_close(model.prefill(torch.arange(40), model.new_cache(100)), last, TOL)
    assert sorted(cache.step.parts[0].replays) == [8, 16, 32, 64]
    cache.truncate(0)
    rows = torch.stack([model.decode(token, cache) for token in tokens.tolist()])
    assert_close(rows, expected, TOL)


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_quantised_linears(
    form: str, nano_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed int4 and int8 products on the device: the bundle's own weights, activations in bf16.

    Reference: the same bundle with float32 activations. The median KL of a bf16 model is 1e-4 here (its mean
    hangs on the few tokens that a router sends elsewhere); wrong codes move every token.
    """
    bundle = quantize_cli(nano_checkpoint, tmp_path / "b", "--cpu-format", "bf16", "--gpu-format", form)
    tokens = torch.arange(2, 50)
    expected = kt.load(bundle, dtype="float32", threads=1).logits(tokens).log_softmax(-1)
    for kind in ("packed", "dense", "auto"):
        monkeypatch.setenv("KTTOOLS_DEVICE_LINEAR", kind)
        model = kt.load(bundle, device="cpu:0", threads=1, prefill="cpu")
        for got, wanted in ((model.logits(tokens), expected), (decoded(model, tokens, 30), expected[29:])):
            kl = (wanted.exp() * (wanted - got.log_softmax(-1))).sum(-1)
            assert float(kl.median()) < 4e-4, kind


def test_expert_table_is_applied(nano_bundle_bf16: Path, plain: Any, samples_dir: Path) -> None:
    """Also by steps captured before it was chosen."""
    tokens, expected = plain
    name = "ds3-nano-6-adaptive"
    wanted = kt.load(nano_bundle_bf16, dtype="float32", threads=1, expert_table=name).logits(tokens)
    model = kt.load(nano_bundle_bf16, device="cpu:0", dtype="float32", threads=1)
    cache = model.new_cache(32)
    for token in tokens[:5].tolist():
        model.decode(token, cache)
    model.use_table(samples_dir.parent / "profiles" / f"{name}.expert-table.json")
    cache.truncate(0)
    rows = torch.stack([model.decode(token, cache) for token in tokens.tolist()])
    assert_close(rows, wanted, TOL)
    assert float((wanted - expected).abs().max()) > 100 * TOL


@pytest.mark.parametrize("hot", ["5", "32"])
def test_a_table_with_hot_and_late_experts(hot: str, nano_bundle_bf16: Path, plain: Any) -> None:
    """The table's choice is the plain path's; then captured steps with deferral are chunks with it."""
    tokens, _ = plain
    options: dict[str, Any] = {"dtype": "float32", "threads": 1, "expert_table": "ds3-nano-6-adaptive"}
    wanted = kt.load(nano_bundle_bf16, **options).logits(tokens)
    model: Any = kt.load(nano_bundle_bf16, **options, device="cpu,cpu", gpu_experts=hot, prefill="gpu")
    assert_close(model.logits(tokens, 9), wanted, TOL)
    model.use_deferral(3)
    late = model.logits(tokens, 9)
    cache = model.new_cache(len(tokens))
    steps = torch.stack([model.decode(token, cache) for token in tokens.tolist()])
    assert_close(steps, late, TOL)
    if hot == "5":
        assert float((late - wanted).abs().max()) > 100 * TOL


@pytest.mark.parametrize(
    "text", ["gpu", "cpu:x", "cuda:0,cpu", "", "cuda:-1", "cpu,cpu:1x", "cpu:", "cpu:12345"]
)
def test_bad_devices(text: str) -> None:
    with pytest.raises(UsageError, match="unknown device"):
        parse_devices(text)


def test_missing_gpu_is_named() -> None:
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is here")
    with pytest.raises(HardwareError, match="cuda:0: torch sees 0 CUDA devices"):
        parse_devices("cuda:0")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"defer_experts": 1}, "--defer-experts needs a device"),
        ({"gpu_experts": "1"}, "--gpu-experts needs a device"),
        ({"prefill": "gpu"}, "--prefill needs a device"),
        ({"device": "cpu:0", "defer_experts": 8}, "defer_experts must be 0 to 7, got 8"),
        ({"device": "cpu:0", "prefill": "fast"}, "prefill must be one of auto, cpu, gpu"),
        ({"device": "cpu,cpu,cpu,cpu,cpu"}, "5 devices for 4 layers"),
        ({"device": "cpu:0", "gpu_experts": "33"}, "33 of 32 experts per layer"),
        ({"device": "cpu:0", "gpu_experts": "auto"}, "simulated devices have no memory of their own"),
        ({"device": "cpu:0", "gpu_experts": "nowhere"}, "no such file"),
        ({"device": "cpu:0", "gpu_experts": "3:"}, "expected auto, a number"),
        ({"device": "cpu:0", "stream_layers": True, "expert_table": "none"}, "with --device cpu only"),
    ],
)
def test_bad_options(nano_bundle_bf16: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        kt.load(nano_bundle_bf16, threads=1, **given)


def test_forced_linear_that_is_not_there(nano_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KTTOOLS_DEVICE_LINEAR", "fast")
    with pytest.raises(UsageError, match="KTTOOLS_DEVICE_LINEAR must be one of auto, packed, triton, dense"):
        kt.load(nano_bundle, device="cpu:0", threads=1)
    monkeypatch.setenv("KTTOOLS_DEVICE_LINEAR", "triton")
    with pytest.raises(HardwareError, match=r"Triton is not installed|kernels need a CUDA device"):
        kt.load(nano_bundle, device="cpu:0", threads=1)
