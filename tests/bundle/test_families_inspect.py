"""What inspect says of kinds beyond DeepSeek-V3's."""

from pathlib import Path

import pytest

from kttools.bundle.inspect import inspect_path
from kttools.bundle.render import render
from tests.family_oracle import hf_model, quantize, save

LINES = {
    ("qwen3_moe", "window"): (
        "gqa, 4 heads of 24 on 2 key heads, window 19",
        "softmax_groups: 16 routed, 3 per token, 0 shared",
    ),
    ("qwen2_moe", "llama3"): ("gqa, 4 heads of 16 on 2 key heads", "512 tokens, llama3 factor 8"),
    ("deepseek_v2", "yarn"): ("mla, 4 heads, latent 32", "512 tokens, yarn factor 4"),
}


@pytest.mark.parametrize(("family", "case"), LINES)
def test_bundle_and_checkpoint(tmp_path: Path, family: str, case: str) -> None:
    checkpoint = save(hf_model(family, case), tmp_path / "hf")
    bundle = quantize(checkpoint, tmp_path / "bundle", "int8", "int4")
    reports = [inspect_path(path) for path in (checkpoint, bundle)]
    assert reports[0]["parameters"] == reports[1]["parameters"]
    for report in reports:
        text = render(report)
        assert all(line in text for line in LINES[family, case])
