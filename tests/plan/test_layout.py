"""Planned sizes against the bundles quantize makes, and against the known sizes of DeepSeek-V3."""

import json
import shutil
from pathlib import Path

import pytest

from kttools.families import detect, open_config
from kttools.families.declared import MAX_EXPERT_TENSORS
from kttools.plan.choice import Choice, SourceSubject, open_subject
from kttools.plan.layout import Layout
from kttools_runtime.errors import InvalidInputError, UsageError
from kttools_runtime.footprint import cache_bytes_per_token, held_bytes
from tests.families.released import RELEASED
from tests.plan.released_v3 import DEEPSEEK_V3

EXPERT_WEIGHTS = 3 * 7168 * 2048  # 44.04 M
GB = 1e9


def layout(path: Path, cpu: str | None = "int8", gpu: str | None = "int4") -> Layout:
    return open_subject(path).layout(Choice(cpu, gpu, 4096, "off", 1))


def dense_bytes(plan: Layout) -> int:
    return sum(held_bytes(tensor, plan.config) for tensor in plan.tensors)


def bytes_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def config_alone(directory: Path, values: dict) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(values))
    return directory


@pytest.mark.parametrize("formats", ["int8 int4", "bf16 bf16"])
def test_sizes_are_those_of_the_bundle(
    formats: str, nano_checkpoint: Path, nano_bundle: Path, nano_bundle_bf16: Path, tmp_path: Path
) -> None:
    """From headers, from config.json alone and from the bundle itself."""
    bundle = nano_bundle if formats == "int8 int4" else nano_bundle_bf16
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(nano_checkpoint / "config.json", alone)
    cpu, gpu = formats.split()
    plans = [layout(nano_checkpoint, cpu, gpu), layout(alone, cpu, gpu), layout(bundle, None, None)]
    for plan in plans:
        assert plan.pack_bytes == bytes_of(bundle / "experts")
        assert plan.shard_bytes == pytest.approx(bytes_of(bundle / "shards"), rel=1e-4)
        assert dense_bytes(plan) == dense_bytes(plans[0])
        assert plan.chosen_expert_bytes == plans[0].chosen_expert_bytes
    assert plans[0].shard_bytes == plans[2].shard_bytes == bytes_of(bundle / "shards")
    assert plans[0].tokenizer_bytes == plans[2].tokenizer_bytes == bytes_of(bundle / "tokenizer")
    assert plans[0].read_bytes
    assert plans[1].read_bytes is None


@pytest.fixture(scope="module")
def v3(tmp_path_factory: pytest.TempPathFactory) -> SourceSubject:
    directory = config_alone(tmp_path_factory.mktemp("v3") / "DeepSeek-V3", DEEPSEEK_V3)
    subject = open_subject(directory)
    assert isinstance(subject, SourceSubject)
    return subject


@pytest.mark.parametrize(("cpu", "bits"), [("int8", 8), ("bf16", 16), ("int4", 4 + 16 / 64)])
def test_deepseek_v3_experts(v3: SourceSubject, cpu: str, bits: float) -> None:
    """58 layers of 256 experts; a scale per row and blobs rounded up to pages take below 0.2 %."""
    plan = v3.layout(Choice(cpu, "int4", 4096, "off", 1))
    weights = 58 * 256 * EXPERT_WEIGHTS
    assert weights == pytest.approx(653.9 * GB, rel=1e-3)
    assert list(plan.expert_formats) == list(range(3, 61))
    assert weights * bits / 8 <= plan.pack_bytes <= weights * bits / 8 * 1.002
    chosen = 58 * 8 * EXPERT_WEIGHTS * bits / 8
    assert chosen <= plan.chosen_expert_bytes <= chosen * 1.002


def test_deepseek_v3_dense_weights_and_cache(v3: SourceSubject) -> None:
    """671.0 B weights of which 653.9 B are experts; 61 layers cache 512 + 64 numbers of bf16 a token."""
    plan = v3.layout(Choice("int8", "bf16", 4096, "off", 1))
    elements = sum(tensor.elements for tensor in plan.tensors)
    assert elements == pytest.approx(671.03e9 - 653.9e9, rel=5e-3)
    assert plan.shard_bytes == pytest.approx(2 * elements, rel=1e-3)
    assert dense_bytes(plan) == pytest.approx(2 * elements, rel=0.03)
    assert cache_bytes_per_token(plan.config) == 61 * (512 + 64) * 2


@pytest.mark.parametrize("name", RELEASED)
def test_every_family_is_planned_from_its_config(name: str, tmp_path: Path) -> None:
    """bf16 takes two bytes for each parameter that the authors state, in billions to one decimal."""
    values, billions = RELEASED[name]
    plan = layout(config_alone(tmp_path / "model", values), "bf16", "bf16")
    assert plan.pack_bytes + plan.shard_bytes == pytest.approx(2e9 * billions, rel=0.01)
    assert plan.bundle_bytes == plan.pack_bytes + plan.shard_bytes


def test_formats_of_a_bundle_are_fixed(nano_bundle: Path) -> None:
    with pytest.raises(UsageError, match="formats are fixed"):
        layout(nano_bundle, "int4", None)


def test_a_config_alone_has_no_weights_to_read(tmp_path: Path) -> None:
    source = open_config(config_alone(tmp_path / "m", DEEPSEEK_V3))
    weights = source.checkpoint
    name = weights.names()[0]
    assert name in weights
    assert len(weights) == len(weights.names()) > 58 * 256 * 3
    for read in (lambda: weights.read(name), lambda: weights.read_rows(name, 0, 1)):
        with pytest.raises(InvalidInputError, match="no weights beside"):
            read()
    with pytest.raises(InvalidInputError, match="no weights beside"):
        source.read_expert(3, 0)


def test_a_config_cannot_ask_for_any_number_of_names(tmp_path: Path) -> None:
    values = DEEPSEEK_V3 | {"num_hidden_layers": 4096, "n_routed_experts": 65536}
    assert detect(values).name == "deepseek_v3"
    with pytest.raises(InvalidInputError, match=f"at most {MAX_EXPERT_TENSORS}"):
        open_config(config_alone(tmp_path / "huge", values))
