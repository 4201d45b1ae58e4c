"""The same claims on a real GPU; skipped by name where there is none.

Reference: the plain CPU path in float32. Tolerances: float32 on the GPU sums in another order (1e-3 of the
largest logit); bf16 is held by its KL, as on the CPU.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

import kttools_runtime as kt
from kttools_runtime import _kernels
from kttools_runtime.errors import EngineError
from tests.compare import assert_close, mean_kl

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
TOKENS = list(range(3, 63))


def decoded(model: Any, prompt: int) -> torch.Tensor:
    cache = model.new_cache(len(TOKENS))
    rows = [model.prefill(TOKENS[:prompt], cache)]
    rows += [model.decode(token, cache) for token in TOKENS[prompt:]]
    return torch.stack(rows).cpu()


def test_the_cuda_runtime_is_found() -> None:
    torch.zeros(1, device="cuda")
    assert "libcudart" in _kernels.loaded_cudart()


@pytest.mark.parametrize(
    "options",
    [{}, {"graphs": False}, {"gpu_experts": "4"}, {"prefill": "gpu"}, {"prefill": "auto"}],
    ids=["graphs", "issued", "hot", "streamed", "auto"],
)
def test_float32_is_the_cpu(
    nano_bundle_bf16: Path, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    expected = kt.load(nano_bundle_bf16, dtype="float32").logits(TOKENS)
    model = kt.load(nano_bundle_bf16, device="cuda:0", dtype="float32", **{"prefill": "cpu", **options})
    assert_close(model.logits(TOKENS).cpu(), expected, 1e-3)
    assert_close(decoded(model, 20), expected[19:], 1e-3)


@pytest.mark.parametrize("kind", ["auto", "packed", "triton", "dense"])
def test_int4_linears(nano_bundle: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KTTOOLS_DEVICE_LINEAR", kind)
    expected = kt.load(nano_bundle, dtype="float32").logits(TOKENS)
    model = kt.load(nano_bundle, device="cuda:0", prefill="cpu")
    assert mean_kl(model.logits(TOKENS).cpu(), expected) < 5e-3
    assert mean_kl(decoded(model, 20), expected[19:]) < 5e-3


def test_deferral_is_the_simulation(nano_bundle_bf16: Path) -> None:
    same: dict[str, Any] = {"dtype": "float32", "defer_experts": 3, "prefill": "cpu"}
    expected = decoded(kt.load(nano_bundle_bf16, device="cpu:0", **same), 20)
    assert_close(decoded(kt.load(nano_bundle_bf16, device="cuda:0", **same), 20), expected, 1e-3)


def test_faults_surface(nano_bundle_bf16: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KTTOOLS_ENGINE_TIMEOUT", "0.5")
    model: Any = kt.load(nano_bundle_bf16, device="cuda:0", prefill="cpu")
    cache = model.new_cache(8)
    for token, fault in enumerate([{"error": "planted"}, {"delay_s": 0.8}, {"error": "planted"}]):
        model.courier.queue.inject(**fault)
        with pytest.raises(EngineError, match=r"planted|longer than 0\.5"):
            model.decode(token, cache)
        model.decode(token, cache)


def test_two_devices(nano_bundle_bf16: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    expected = kt.load(nano_bundle_bf16, dtype="float32").logits(TOKENS)
    model = kt.load(nano_bundle_bf16, device="cuda:0,cuda:1", dtype="float32", prefill="cpu", defer_experts=0)
    assert_close(decoded(model, 20), expected[19:], 1e-3)
