"""Makes FP8 checkpoints out of BF16 ones; torch's own float8 cast, no code of the reader."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from kttools_runtime.safetensors_file import read_header, read_tensor
from tests.forge import save

BLOCK = 128
QUANTIZATION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [BLOCK, BLOCK],
}
KEPT_WIDE = ("embed_tokens", "lm_head", "layernorm", "norm.weight", "mlp.gate.weight", "e_score")


def encode(weight: Tensor, rows: int = BLOCK, columns: int = BLOCK) -> tuple[Tensor, Tensor]:
    """(codes float8_e4m3fn [N, K], scales float32 per block), each block scaled to e4m3's largest number."""
    count, width = weight.shape
    padded = pad(weight.float(), (0, -width % columns, 0, -count % rows))
    blocks = padded.view(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)
    scales = blocks.abs().amax(dim=(1, 3)).clamp(min=1e-12) / 448.0
    codes = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    return codes.view(padded.shape)[:count, :width].contiguous(), scales


def decode(codes: Tensor, scales: Tensor, rows: int = BLOCK, columns: int = BLOCK) -> Tensor:
    """bf16 of codes times scales, by torch's float8 cast and an expanded scale for every weight."""
    wide = scales.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return (codes.float() * wide[: codes.shape[0], : codes.shape[1]]).to(torch.bfloat16)


def is_fp8(name: str, tensor: Tensor) -> bool:
    """What DeepSeek's release holds in FP8: linears of attention and MLPs."""
    return tensor.dim() == 2 and not any(word in name for word in KEPT_WIDE)


def read_all(source: Path) -> dict[str, Tensor]:
    files = sorted(source.glob("*.safetensors"))
    return {name: read_tensor(info) for file in files for name, info in read_header(file).tensors.items()}


def make_pair(source: Path, target: Path) -> tuple[Path, Path]:
    """`target`/fp8 and `target`/bf16: the same numbers in FP8 with scales, and dequantised."""
    fp8: dict[str, Tensor] = {}
    bf16: dict[str, Tensor] = {}
    for name, tensor in read_all(source).items():
        if is_fp8(name, tensor):
            codes, scales = encode(tensor)
            fp8 |= {name: codes, f"{name}_scale_inv": scales}
            bf16[name] = decode(codes, scales)
        else:
            fp8[name] = bf16[name] = tensor
    config = json.loads((source / "config.json").read_text())
    wanted: list[tuple[str, dict[str, Tensor], dict[str, Any]]] = [
        ("fp8", fp8, {"quantization_config": QUANTIZATION}),
        ("bf16", bf16, {}),
    ]
    for kind, tensors, extra in wanted:
        folder = target / kind
        folder.mkdir(parents=True)
        for file in source.glob("*.json"):
            if "index" not in file.name:
                shutil.copy(file, folder)
        (folder / "config.json").write_text(json.dumps(config | extra))
        save(folder / "model.safetensors", tensors)
    return target / "fp8", target / "bf16"
