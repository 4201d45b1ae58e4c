"""save_pretrained -> kttools quantize -> kt.load, held against the model that was saved."""

from pathlib import Path
from typing import Any

import pytest
import torch

import kttools_runtime as kt
from tests.compare import assert_close, assert_same_distribution
from tests.conftest import quantize
from tests.oracle import CONFIGS, hf_logits, hf_model, text_tokens, trained_model

NAMES = (
    "query_without_rank",
    "all_moe_no_shared",
    "all_dense",
    "yarn_two_mscales",
    "halves_rope",
    "tied",
    "odd_sizes",
    "one_group",
)


@pytest.fixture(scope="module")
def tokenizer_files(nano_checkpoint: Path) -> list[Path]:
    return [nano_checkpoint / "tokenizer.json", nano_checkpoint / "tokenizer_config.json"]


def save(hf: Any, directory: Path, tokenizer_files: list[Path]) -> Path:
    hf.to(torch.bfloat16).save_pretrained(directory)
    for file in tokenizer_files:
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


@pytest.mark.parametrize("name", NAMES)
def test_reference_path(name: str, tmp_path: Path, tokenizer_files: list[Path]) -> None:
    hf = hf_model(CONFIGS[name])
    tokens = torch.randint(0, hf.config.vocab_size, (120,), generator=torch.Generator().manual_seed(1))
    reference = hf_logits(hf, tokens)
    checkpoint = save(hf, tmp_path / "checkpoint", tokenizer_files)
    quantize(checkpoint, tmp_path / "bundle", "--cpu-format", "bf16", "--gpu-format", "bf16")
    logits = kt.load(tmp_path / "bundle", dtype="float32", threads=1).logits(tokens)
    assert_close(logits, reference, 2e-5)
    assert_same_distribution(logits, reference, kl=1e-5, top1=0.999)


def test_sample_model(nano_bundle_bf16: Path, nano_checkpoint: Path, samples_dir: Path) -> None:
    hf = trained_model(nano_checkpoint)
    tokens = text_tokens(nano_checkpoint, samples_dir / "text" / "prose.jsonl", 256)
    reference = hf_logits(hf, tokens)
    exact = kt.load(nano_bundle_bf16, dtype="float32", threads=1).logits(tokens)
    assert_same_distribution(exact, reference, kl=1e-5, top1=0.999)
    assert_same_distribution(kt.load(nano_bundle_bf16, threads=1).logits(tokens), reference, kl=2e-3)


def test_larger_model_in_the_default_formats(tiny_checkpoint: Path, shared_dir: Path, tmp_path: Path) -> None:
    """int8 experts and int4 shards: at most 0.03."""
    hf = trained_model(tiny_checkpoint)
    quantize(tiny_checkpoint, tmp_path / "bundle")
    model = kt.load(tmp_path / "bundle", threads=2)
    corpora = sorted((shared_dir / "corpora").glob("*.valid.jsonl"))
    sequences = [text_tokens(tiny_checkpoint, path, 400) for path in corpora]
    reference = torch.cat([hf_logits(hf, tokens) for tokens in sequences])
    assert_same_distribution(torch.cat([model.logits(tokens) for tokens in sequences]), reference, kl=0.03)
