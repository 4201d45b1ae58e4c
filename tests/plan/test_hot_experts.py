"""Hot experts of a plan: chosen as a load chooses them, and predicted by the profile that chose them.

The prediction is held against what an engine is really given, on the simulated device: of each token's
choices those that arrive as -1 cost no bytes of RAM.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kttools_runtime as kt
from kttools import cli
from kttools.profiling.profile_file import Profile, write_profile
from kttools_runtime.hybrid.mixture import Mixture
from tests.oracle import text_tokens

MACHINE = ("--bandwidth", "10", "--tops", "1", "--vram-bandwidth", "100", "--gpu-tops", "10", "-t", "2")
TOKENS, HELD_OUT, STEPS = 1200, 400, 20
ENGINE: dict[str, Any] = {"device": "cpu:0", "dtype": "float32", "threads": 1, "prefill": "cpu"}


def planned(capsys: pytest.CaptureFixture[str], *line: str) -> tuple[int, dict[str, Any], str]:
    code = cli.main(["plan", *line, *MACHINE, "--quiet", "--json"])
    captured = capsys.readouterr()
    return code, json.loads(captured.out or "{}"), captured.err


def write_counts(directory: Path, counts: np.ndarray) -> Path:
    directory.mkdir()
    header = {"format": "kttools-expert-profile", "version": 1}
    write_profile(directory, Profile(header, {"text": {"count": counts}}, {}))
    return directory / "profile.expert-profile.json"


def given_in_steps(model: Any, tokens: torch.Tensor) -> np.ndarray:
    """[MoE layers, n_routed_experts]: how often each expert's id arrived at the engine in decode steps."""
    cache = model.new_cache(len(tokens))
    counts = np.zeros((len(model.mixtures), model.config.n_routed_experts))
    for token in tokens.tolist():
        model.decode(token, cache)
        for row, layer in zip(counts, model.mixtures, strict=True):
            ids = cache.step.mixtures[layer].now.ids
            row[ids[ids >= 0].numpy()] += 1
    return counts


def given_in_chunks(model: Any, tokens: torch.Tensor) -> np.ndarray:
    """The same of a text in one pass."""
    counts = np.zeros((len(model.mixtures), model.config.n_routed_experts))
    with pytest.MonkeyPatch.context() as patch:
        layers = iter(range(len(counts)))
        begin = Mixture._engine

        def engine(self: Mixture, x: Any, ids: torch.Tensor, *rest: Any) -> torch.Tensor:
            counts[next(layers)] += np.bincount(ids[ids >= 0].numpy(), minlength=counts.shape[1])
            return begin(self, x, ids, *rest)

        patch.setattr(Mixture, "_engine", engine)
        model.logits(tokens, chunk_size=len(tokens))
    return counts


@pytest.fixture(scope="module")
def profile(
    nano_bundle_bf16: Path, nano_checkpoint: Path, samples_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, np.ndarray, torch.Tensor]:
    """(file, counts, tokens): the experts that a text asks the engine for when none is hot."""
    tokens = text_tokens(nano_checkpoint, samples_dir / "text" / "python.jsonl", TOKENS + HELD_OUT)
    model = kt.load(nano_bundle_bf16, **ENGINE)
    counts = given_in_chunks(model, tokens[:TOKENS])
    assert counts.sum() == TOKENS * len(counts) * model.config.num_experts_per_tok
    return write_counts(tmp_path_factory.mktemp("p") / "profile", counts), counts, tokens


@pytest.mark.parametrize("number", [4, 12])
def test_hits_in_the_engine_are_those_predicted(
    number: int,
    nano_bundle_bf16: Path,
    profile: tuple[Path, np.ndarray, torch.Tensor],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On the profile's text to the last choice; on the text behind it within 20 % of the bytes to read."""
    file, counts, tokens = profile
    asked = ("--vram", "24G", "--gpu-experts", f"{number}:{file}")
    code, document, _ = planned(capsys, str(nano_bundle_bf16), "--dram", "8G", *asked)
    assert code == 0
    share = document["gpu_experts"]["hit_share"]
    assert share == pytest.approx(np.sort((counts / TOKENS).ravel())[::-1][: 3 * number].sum() / 3 / 8)
    model = kt.load(nano_bundle_bf16, **ENGINE, gpu_experts=f"{number}:{file}")
    chosen = 3 * 8
    cold = given_in_chunks(model, tokens[:TOKENS]).sum() / (TOKENS * chosen)
    assert cold == pytest.approx(1 - share, abs=1e-3)
    unseen = given_in_chunks(model, tokens[TOKENS:]).sum() / (HELD_OUT * chosen)
    assert abs(unseen / (1 - share) - 1) < 0.2
    few = tokens[:STEPS]
    assert given_in_steps(model, few).sum() == pytest.approx(given_in_chunks(model, few).sum(), abs=2)
    assert share > 1.2 * number / 32
    assert document["commands"][-1].endswith(f"--gpu-experts {number}:{file}")
    assert any("as often as in the text of" in line for line in document["assumptions"])


def test_speed_follows_the_hit_rate(
    nano_bundle_bf16: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every token chooses the same eight: with those on the GPU the CPU reads nothing, without a profile it
    reads three quarters."""
    counts = np.zeros((3, 32))
    counts[:, 24:] = 7.0
    file = write_counts(tmp_path / "p", counts)
    base = (str(nano_bundle_bf16), "--dram", "8G", "--vram", "24G")
    shares, speeds = {}, {}
    for asked in ("0", "8", f"8:{file}", f"4:{file}", f"auto:{file}"):
        _, document, _ = planned(capsys, *base, "--gpu-experts", asked)
        shares[asked], speeds[asked] = (
            document["gpu_experts"]["hit_share"],
            document["upper_bounds"]["decode_tokens_s"],
        )
    assert list(shares.values()) == pytest.approx([0, 0.25, 1, 0.5, 1])
    assert speeds["0"] < speeds["8"] < speeds[f"4:{file}"] < speeds[f"8:{file}"]


def test_a_list_is_taken_as_it_is(
    nano_bundle_bf16: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "hot.json"
    file.write_text(json.dumps({"format": "kttools-gpu-experts", "layers": {"1": [3, 0], "3": [31]}}))
    base = (str(nano_bundle_bf16), "--dram", "8G", "--gpu-experts", str(file))
    code, document, _ = planned(capsys, *base, "--vram", "24G")
    assert code == 0
    assert document["gpu_experts"]["hit_share"] == pytest.approx(3 / 96)
    (device,) = document["devices"]
    assert device["hot_expert_bytes"] > 0
    assert document["commands"][-1].endswith(f"--gpu-experts {file}")
    total = device["total_bytes"]
    small = f"{(total - device['hot_expert_bytes'] // 2) / (1 << 20):.4f}M"
    code, _, error = planned(capsys, *base, "--vram", small)
    assert code == 4
    assert "--gpu-experts 0" in error


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("nowhere", 2, "no such file"),
        ("33", 2, "33 of 32 experts per layer"),
        ("-1", 2, "no such file"),
        ("auto:", 2, "expected auto, a number"),
        ("{}", 3, "neither an expert profile nor a list"),
    ],
)
def test_bad_requests(
    text: str,
    code: int,
    message: str,
    nano_bundle_bf16: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if text == "{}":
        text = str(tmp_path / "bad.json")
        Path(text).write_text("{}")
    got, _, error = planned(capsys, str(nano_bundle_bf16), "--vram", "24G", f"--gpu-experts={text}")
    assert got == code
    assert message in error
    assert error.count("\n") == 1
