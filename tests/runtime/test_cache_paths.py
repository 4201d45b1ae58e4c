"""Every way through the cache gives the same answer: chunks, decode, truncation, thread counts.

float32: paths differ in the order of sums only (1e-5, see test_reference). Default dtype: absorbed decode and
full-head prefill round at different places (bf16, 2^-9), so distributions are compared, on a trained model.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from kttools_runtime.model import Model
from tests.compare import assert_close, assert_same_distribution, mean_kl
from tests.oracle import CONFIGS, hf_model, runtime_model, text_tokens, trained_model

TOL = 1e-5
BF16_KL = 2e-3
NAMES = ("base", "halves_rope", "yarn_two_mscales", "odd_heads")


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    return {name: runtime_model(hf_model(CONFIGS[name])) for name in NAMES}


@pytest.fixture(scope="module")
def nano(nano_checkpoint: Path) -> Any:
    return trained_model(nano_checkpoint)


@pytest.fixture(scope="module")
def text(nano_checkpoint: Path, samples_dir: Path) -> torch.Tensor:
    return text_tokens(nano_checkpoint, samples_dir / "text" / "python.jsonl", 200)


def tokens_for(model: Model, num_tokens: int = 150) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, model.config.vocab_size, (num_tokens,), generator=generator)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chunk_size", [1, 7, 64])
def test_chunks_equal_whole(models: dict[str, Model], name: str, chunk_size: int) -> None:
    model = models[name]
    tokens = tokens_for(model)
    whole, chunked = model.new_cache(150), model.new_cache(150)
    expected = model.prefill(tokens, whole)
    assert_close(model.prefill(tokens, chunked, chunk_size), expected, TOL)
    for layer, (got_rows, rows) in enumerate(zip(chunked.layers, whole.layers, strict=True)):
        assert_close(got_rows, rows, TOL, f"cache of layer {layer}")
    assert_close(model.logits(tokens, chunk_size), model.logits(tokens), TOL)


@pytest.mark.parametrize("name", NAMES)
def test_decode_equals_prefill(models: dict[str, Model], name: str) -> None:
    model = models[name]
    tokens = tokens_for(model)
    cache = model.new_cache(150)
    rows = [model.prefill(tokens[:60], cache)]
    rows += [model.decode(int(token), cache) for token in tokens[60:]]
    assert_close(torch.stack(rows), model.logits(tokens)[59:], TOL)


def test_truncated_cache_continues(models: dict[str, Model]) -> None:
    model = models["base"]
    tokens = tokens_for(model, 40)
    cache = model.new_cache(64)
    model.prefill(tokens, cache)
    model.prefill(tokens[:20].flip(0), cache)
    cache.truncate(30)
    assert_close(model.prefill(tokens[30:], cache), model.logits(tokens)[-1], TOL)


def test_two_caches_do_not_mix(models: dict[str, Model]) -> None:
    model = models["base"]
    tokens = tokens_for(model, 40)
    first, second = model.new_cache(40), model.new_cache(40)
    model.prefill(tokens[:20], first)
    model.prefill(tokens.flip(0), second)
    assert_close(model.prefill(tokens[20:], first), model.logits(tokens)[-1], TOL)


@pytest.mark.parametrize(("experts", "linears"), [("bf16", "bf16"), ("int8", "int4")])
def test_default_dtype_decode_and_chunks(nano: Any, text: torch.Tensor, experts: str, linears: str) -> None:
    model = runtime_model(nano, torch.bfloat16, experts, linears)
    whole = model.logits(text)
    cache = model.new_cache(len(text))
    decoded = torch.stack([model.decode(int(token), cache) for token in text])
    assert_same_distribution(decoded, whole, BF16_KL, what="decode")
    for chunk_size in (7, 64):
        assert_same_distribution(
            model.logits(text, chunk_size), whole, BF16_KL, what=f"chunks of {chunk_size}"
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_thread_counts_give_the_same_text(nano: Any, text: torch.Tensor, dtype: torch.dtype) -> None:
    prompt = text[:50].tolist()
    answers, logits = [], []
    for threads in (1, 2, 3):
        model = runtime_model(nano, dtype, "int8", "int4", threads=threads)
        answers.append(list(model.generate(prompt, 24, temperature=0.9, seed=7, stop_ids=[])))
        logits.append(model.logits(text))
    assert answers[0] == answers[1] == answers[2]
    assert len(answers[0]) == 24
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


def test_seed_decides_the_text(nano: Any, text: torch.Tensor) -> None:
    model = runtime_model(nano, torch.bfloat16, "int8", "int4")
    prompt = text[:50].tolist()
    first, again, other = (
        list(model.generate(prompt, 24, temperature=1.2, seed=seed, stop_ids=[])) for seed in (1, 1, 2)
    )
    assert first == again != other


def test_flat_fewer_experts_matches_the_oracle(nano: Any, text: torch.Tensor) -> None:
    """num_experts=5 is transformers with gate.top_k = 5; it is not the model with 8."""
    model = runtime_model(nano, num_experts=5)
    eight = runtime_model(nano).logits(text)
    moe_layers = [layer.mlp for layer in nano.model.layers if hasattr(layer.mlp, "gate")]
    for mlp in moe_layers:
        mlp.gate.top_k = 5
    with torch.inference_mode():
        reference = nano(text[None], use_cache=False).logits[0]
    for mlp in moe_layers:
        mlp.gate.top_k = 8
    assert_close(model.logits(text), reference, 2e-5)
    assert mean_kl(eight, reference) > 1e-3
