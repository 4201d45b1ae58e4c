"""Peak memory of quantising FP8 and GGUF with DeepSeek-V3's true shapes: one expert is decoded at a time."""

import json
from pathlib import Path
from typing import Any

import pytest

from kttools.checkpoint.gguf.types import BY_NAME
from kttools.families import canonical_tensors
from kttools.gguf_out.pairs import head_bytes, padding, pair_bytes, tensor_bytes, typed
from tests.checkpoint.fp8_forge import QUANTIZATION
from tests.large_shapes import (
    EXPERTS,
    HIDDEN,
    INNER,
    VALUES,
    check_peak,
    hub_shapes,
    model_config,
    write_safetensors,
)


def sparse_fp8(path: Path) -> Path:
    """Codes and scales of zero in a file with holes."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(VALUES | {"quantization_config": QUANTIZATION}))
    tensors: list[tuple[str, str, tuple[int, ...]]] = []
    for name, shape in hub_shapes().items():
        is_fp8 = len(shape) == 2 and "mlp.gate." not in name and "embed" not in name and "head" not in name
        tensors.append((name, "F8_E4M3" if is_fp8 else "BF16", shape))
        if is_fp8:
            tensors.append((f"{name}_scale_inv", "F32", tuple(-(-side // 128) for side in shape)))
    write_safetensors(path / "model.safetensors", tensors)
    return path


def sparse_gguf(path: Path) -> Path:
    """Q4_K blocks of zeros, experts stacked, in a file with holes."""
    from kttools.checkpoint.gguf.architectures import ARCHITECTURES
    from kttools.checkpoint.gguf.architectures.base import model_keys

    model = model_config()
    architecture = ARCHITECTURES[0]
    values = model_keys(model, architecture.keys) | architecture.describe(model)
    pairs = {f"deepseek2.{key}": value for key, value in values.items()}
    pairs |= {"general.architecture": "deepseek2", "deepseek2.attention.key_length": 192}
    pairs["deepseek2.attention.value_length"] = 128
    del pairs["deepseek2.attention.key_length_mla"], pairs["deepseek2.attention.value_length_mla"]
    shapes = {spec.name: spec.shape for spec in canonical_tensors(model)}
    prefix = "model.layers.1.mlp.experts."
    shapes |= {prefix + name: (EXPERTS, INNER, HIDDEN) for name in ("gate_proj", "up_proj")}
    shapes[prefix + "down_proj"] = (EXPERTS, HIDDEN, INNER)
    table, position = b"", 0
    for name, shape in shapes.items():
        found = architecture.gguf_name(name)
        assert found is not None, name
        kind = BY_NAME["Q4_K" if len(shape) > 1 and "gate." not in name else "F32"]
        table += tensor_bytes(found[0], kind, shape, position)
        size = kind.row_bytes(shape[-1]) or 0
        for dim in shape[:-1]:
            size *= dim
        position += size + len(padding(size))
    head = head_bytes(len(shapes), len(pairs))
    head += b"".join(pair_bytes(key, typed(value)) for key, value in pairs.items()) + table
    with path.open("wb") as stream:
        stream.write(head + padding(len(head)))
        stream.truncate(stream.tell() + position)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(("make", "name"), [(sparse_fp8, "fp8"), (sparse_gguf, "x.gguf")])
def test_peak_memory_is_bounded_and_as_planned(tmp_path: Path, make: Any, name: str) -> None:
    check_peak(make(tmp_path / name), tmp_path / "b", workers=1)
