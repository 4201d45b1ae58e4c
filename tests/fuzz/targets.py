"""What is fuzzed: seeds, and a function that reads a file as far as the program ever would."""

import json
from pathlib import Path
from typing import Any

import torch

from kttools.checkpoint import open_checkpoint
from kttools.checkpoint.gguf import open_gguf
from kttools.checkpoint.gguf.splits import open_files
from kttools.checkpoint.gguf.types import TYPES
from kttools.checkpoint.gguf.views import read_rows
from kttools.families import open_model
from kttools.families.gpt_oss_tensors import GptOssWeights
from kttools_runtime.errors import InvalidInputError
from kttools_runtime.tokenizer import Tokenizer
from tests.checkpoint import test_fp8, test_gguf_hostile, test_gguf_sentencepiece
from tests.checkpoint.gguf_forge import Image, Tensor, deepseek2
from tests.forge import config, hub_tensors, save, save_sharded
from tests.fuzz.archive_target import ARCHIVE_TARGETS
from tests.fuzz.bundle_targets import BUNDLE_TARGETS
from tests.fuzz.target import Target

READ_BYTES = 64 << 20  # sound files of the corpus are far smaller; a larger tensor is a lie that went through


def gguf_seeds(_: Path) -> list[bytes]:
    """Sound models of every layout, every type, and the hostile files of the tests."""
    sound = [deepseek2(layout).bytes() for layout in ("kv_b", "k_b + v_b", "both")]
    sound.append(deepseek2(**test_gguf_sentencepiece.changes()).bytes())
    typed = [
        Image([], [Tensor("a", (256, 2), kind.number, bytes(2 * (kind.row_bytes(256) or 0)))]).bytes()
        for kind in TYPES.values()
    ]
    return sound * 8 + typed + [image.bytes() for image, _ in test_gguf_hostile.HOSTILE.values()]


def run_gguf(file: Path) -> None:
    for tensor in open_files(file).tensors.values():
        assert tensor.bytes < READ_BYTES
        if tensor.kind.dtype:
            assert tuple(read_rows(tensor, 0, tensor.shape[0]).shape) == tensor.shape
    model = open_gguf(file)
    _read_all(model.weights)
    source = open_model(file)
    for layer in source.moe_layers[:2]:
        source.read_expert(layer, 0)
    if "tokenizer.json" in model.tokenizer_data:
        for name, data in model.tokenizer_data.items():
            (file.parent / name).write_bytes(data)
        Tokenizer(file.parent).encode("a th <s>")


def safetensors_seeds(folder: Path) -> list[bytes]:
    save(folder / "a.safetensors", hub_tensors(config()))
    save(folder / "b.safetensors", {"w": test_fp8.CODES, "w_scale_inv": test_fp8.SCALES})
    save(folder / "c.safetensors", mxfp4_tensors())
    save(folder / "d.safetensors", {"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)})
    return [(folder / f"{name}.safetensors").read_bytes() for name in "abcd"]


def mxfp4_tensors() -> dict[str, torch.Tensor]:
    """The experts of a layer of gpt-oss: 2 of hidden_size 32 and inner size 64."""
    prefix = "model.layers.0.mlp.experts."
    return {
        f"{prefix}gate_up_proj_blocks": torch.arange(2 * 128 * 16).to(torch.uint8).view(2, 128, 1, 16),
        f"{prefix}gate_up_proj_scales": torch.full((2, 128, 1), 120, dtype=torch.uint8),
        f"{prefix}gate_up_proj_bias": torch.ones(2, 128),
        f"{prefix}down_proj_blocks": torch.arange(2 * 32 * 32).to(torch.uint8).view(2, 32, 2, 16),
        f"{prefix}down_proj_scales": torch.full((2, 32, 2), 120, dtype=torch.uint8),
        f"{prefix}down_proj_bias": torch.ones(2, 32),
        "model.norm.weight": torch.ones(32),
    }


def run_safetensors(file: Path) -> None:
    _read_all(open_checkpoint(file))
    _read_all(open_checkpoint(file, test_fp8.QUANTIZATION))
    _read_all(GptOssWeights(open_checkpoint(file, {"quant_method": "mxfp4"})))


def index_seeds(folder: Path) -> list[bytes]:
    save_sharded(folder, hub_tensors(config()), 3)
    return [(folder / "model.safetensors.index.json").read_bytes()]


def run_index(file: Path) -> None:
    for shard in range(3):  # the shards lie where the seeds were made
        link = file.parent / f"model-{shard + 1:05d}-of-00003.safetensors"
        if not link.exists():
            link.symlink_to(file.parent / "seeds" / link.name)
    _read_all(open_checkpoint(file))


def config_seeds(_: Path) -> list[bytes]:
    return [json.dumps(config()).encode()]


def run_config(file: Path) -> None:
    """config.json beside a sound model.safetensors."""
    folder = file.parent / "model"
    if not folder.is_dir():
        folder.mkdir()
        save(folder / "model.safetensors", hub_tensors(config()))
    (folder / "config.json").write_bytes(file.read_bytes())
    open_model(folder)


def _read_all(weights: Any) -> None:
    for name in weights.names():
        info = weights.info(name)
        assert info.bytes < READ_BYTES, f"{name}: {info.bytes} bytes"
        try:
            tensor = weights.read(name)
        except InvalidInputError:
            continue
        assert tuple(tensor.shape) == tuple(info.shape)
        if tensor.dim() and tensor.shape[0]:
            assert isinstance(weights.read_rows(name, 0, 1), torch.Tensor)


TARGETS: dict[str, Target] = {
    "gguf": Target(".gguf", gguf_seeds, run_gguf),
    "safetensors": Target(".safetensors", safetensors_seeds, run_safetensors),
    "index": Target(".safetensors.index.json", index_seeds, run_index),
    "config": Target(".json", config_seeds, run_config),
    **BUNDLE_TARGETS,
    **ARCHIVE_TARGETS,
}
