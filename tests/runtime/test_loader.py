"""kt.load: options, refusals, laziness of the package, shards that lie."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kttools_runtime as kt
from kttools_runtime.errors import (
    CorruptFileError,
    HardwareError,
    InvalidInputError,
    UsageError,
)
from kttools_runtime.shards import ShardWeights
from tests.forge import save
from tests.oracle import quantized


def test_import_does_no_work() -> None:
    """The import loads neither torch nor the extension nor the toolkit; every public name is there."""
    script = (
        "import sys, kttools_runtime as kt\n"
        "heavy = {'torch', 'numpy', 'kttools', 'click', 'datasets', 'kttools_runtime._kernels'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "assert set(kt.__all__) <= set(dir(kt))\n"
        "for name in kt.__all__: getattr(kt, name)\n"
        "assert callable(kt.load)\n"
        "assert not {'kttools', 'click', 'datasets', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_unknown_name_of_the_package() -> None:
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        kt.lode  # noqa: B018


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dtype": "float16"}, UsageError, "dtype must be float32 or bfloat16, got 'float16'"),
        ({"device": "gpu"}, UsageError, "unknown device 'gpu'"),
        ({"device": "meta"}, UsageError, "unknown device 'meta'"),
        ({"device": "cuda:99"}, HardwareError, "device cuda:99: torch sees"),
        ({"cache_len": 0}, UsageError, "cache_len must be positive, got 0"),
        ({"expert_table": "t.json", "num_experts": 4}, UsageError, "an expert table and a number of experts"),
        ({}, InvalidInputError, "not a bundle"),
    ],
)
def test_refusals(tmp_path: Path, options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        kt.load(tmp_path, **options)  # type: ignore[arg-type]


def test_loaded_bundle(nano_bundle: Path) -> None:
    model = kt.load(nano_bundle, threads=1, cache_len=100, expert_table="none", num_experts=4)
    assert model.new_cache().capacity == 100
    prompt = model.tokenizer.apply_chat_template([{"role": "user", "content": "Who are you?"}])
    answer = list(model.generate(prompt, 5, stop_ids=[]))
    assert len(answer) == 5
    assert model.logits(prompt).shape == (len(prompt), model.config.vocab_size)
    assert model.logits(prompt).dtype == torch.float32


def test_bundle_answers_what_its_model_learned(nano_bundle: Path) -> None:
    model = kt.load(nano_bundle, threads=1)
    prompt = model.tokenizer.apply_chat_template([{"role": "user", "content": "What is AMX?"}])
    answer = model.tokenizer.decode(list(model.generate(prompt, 60)))
    assert "AMX" in answer


@pytest.mark.parametrize("isa_name", ["sse", "AMX"])
def test_unknown_kernel_table(nano_bundle: Path, isa_name: str) -> None:
    with pytest.raises(HardwareError, match=isa_name):
        kt.load(nano_bundle, isa=isa_name)


def test_impossible_requests_of_a_loaded_model(nano_bundle: Path) -> None:
    model = kt.load(nano_bundle, threads=1)
    cache = model.new_cache(4)
    vocab = model.config.vocab_size
    with pytest.raises(InvalidInputError, match="prompt is empty"):
        model.prefill([], cache)
    with pytest.raises(InvalidInputError, match="5 tokens do not fit into the cache of 4"):
        model.prefill([3] * 5, cache)
    with pytest.raises(InvalidInputError, match=f"token id {vocab} is outside the vocabulary"):
        model.prefill([3, vocab], cache)
    with pytest.raises(InvalidInputError, match="token id -1 is outside"):
        model.decode(-1, cache)
    with pytest.raises(InvalidInputError, match="list of integers"):
        model.logits(torch.zeros(3))
    with pytest.raises(UsageError, match="chunk_size must be positive, got 0"):
        model.prefill([3], cache, chunk_size=0)
    with pytest.raises(UsageError, match="cache_len must be positive"):
        model.new_cache(0)
    assert cache.length == 0
    model.prefill([3, 4, 5, 6], cache)
    with pytest.raises(
        InvalidInputError, match="1 tokens do not fit into the cache of 4 after the 4 it holds"
    ):
        model.decode(3, cache)
    with pytest.raises(InvalidInputError, match="cannot truncate a cache of 4 tokens to 5"):
        cache.truncate(5)


def test_model_without_tokenizer(nano_bundle: Path, tmp_path: Path) -> None:
    model = kt.load(nano_bundle, threads=1)
    model._tokenizer_dir = None
    with pytest.raises(UsageError, match="has no tokenizer"):
        _ = model.tokenizer


def test_missing_shard_is_noticed_at_load(nano_bundle: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(nano_bundle, bundle)
    next((bundle / "shards").glob("*.safetensors")).unlink()
    with pytest.raises(CorruptFileError, match="shards/"):
        kt.load(bundle)


def shard(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save(path, tensors)
    return path


def test_shards_by_format(tmp_path: Path) -> None:
    weight = torch.randn(6, 128, generator=torch.Generator().manual_seed(0))
    tensors = {"norm": torch.ones(5)}
    for form in ("bf16", "int8", "int4"):
        parts = quantized(form, weight, form).parts
        tensors.update({f"{form}.{suffix}": part for suffix, part in parts.items()})
    source = ShardWeights([shard(tmp_path / "a.safetensors", tensors)], {"int8": "int8"})
    assert torch.equal(source.tensor("norm", (5,)), torch.ones(5))
    for form in ("bf16", "int8", "int4"):
        expected = quantized(form, weight, form).dequantized()
        assert torch.equal(source.linear(form, 6, 128).dequantized(), expected)
    with pytest.raises(CorruptFileError, match=r"tensor norm: expected shape \[4\], got \[5\]"):
        source.tensor("norm", (4,))
    with pytest.raises(CorruptFileError, match="no shard holds tensor gone"):
        source.tensor("gone", (4,))
    with pytest.raises(CorruptFileError, match=r"no shard holds gone\.weight in any format"):
        source.linear("gone", 4, 4)
    with pytest.raises(CorruptFileError, match="expected 7 output rows, got 6"):
        source.linear("int8", 7, 128)
    with pytest.raises(InvalidInputError, match=r"int8\.qweight: expected shape \(6, 64\), got \(6, 128\)"):
        source.linear("int8", 6, 64)


def test_shards_that_disagree(tmp_path: Path) -> None:
    parts = quantized("m", torch.ones(4, 32), "int8").parts
    tensors = {f"m.{suffix}": part for suffix, part in parts.items()}
    one, two = (shard(tmp_path / name, tensors) for name in ("a.safetensors", "b.safetensors"))
    with pytest.raises(CorruptFileError, match="the manifest says int4, the shards hold int8"):
        ShardWeights([one], {"m": "int4"}).linear("m", 4, 32)
    with pytest.raises(CorruptFileError, match=r"b\.safetensors: tensor m\.\w+ is also in .*a\.safetensors"):
        ShardWeights([one, two], {})
