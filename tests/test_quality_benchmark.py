"""benchmarks/quality.py runs on the samples, and its figures are those of the comparer."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kttools_runtime as kt
from tests.compare import mean_kl, top1_agreement
from tests.oracle import text_tokens


def run(repo: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, repo / "benchmarks" / "quality.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_figures(
    repo: Path, samples_dir: Path, nano_checkpoint: Path, nano_bundle: Path, nano_bundle_bf16: Path
) -> None:
    options = ["--corpora", samples_dir / "text", "--split", "", "--tokens", 120, "--window", 120]
    done = run(repo, "--json", "--threads", 1, "--reference", nano_bundle_bf16, *options, nano_bundle)
    assert done.returncode == 0, done.stderr
    scores = {score["domain"]: score for score in json.loads(done.stdout)["scores"]}
    tokens = text_tokens(nano_checkpoint, samples_dir / "text" / "prose.jsonl", 120)
    reference = kt.load(nano_bundle_bf16, dtype="float32", threads=1).logits(tokens)
    logits = kt.load(nano_bundle, threads=1).logits(tokens)
    prose = scores["prose"]
    assert prose["tokens"] == 119
    assert prose["kl"] == pytest.approx(mean_kl(logits[:-1], reference[:-1]), rel=1e-3)
    assert prose["top1"] == pytest.approx(top1_agreement(logits[:-1], reference[:-1]))
    loss = torch.nn.functional.cross_entropy(reference[:-1], tokens[1:])
    assert prose["reference_perplexity"] == pytest.approx(float(loss.exp()), rel=1e-4)
    domains = [score for domain, score in scores.items() if domain != "mean"]
    assert scores["mean"]["kl"] == pytest.approx(sum(s["kl"] for s in domains) / len(domains))


def test_no_corpora(repo: Path, tmp_path: Path) -> None:
    done = run(repo, "--reference", tmp_path, "--corpora", tmp_path, tmp_path)
    assert done.returncode == 1
    assert "no *.test.jsonl" in done.stderr
