"""eval: scores against plain NumPy, reference files and their lies, the command from end to end."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kttools.cli import main
from kttools.eval.reference_file import KEY, answer_of, read_reference, write_reference
from kttools.eval.run import evaluate, evaluate_against_file
from kttools.eval.scores import Tally, TokenScores, compare
from kttools.eval.windows import Window, read_windows
from kttools_runtime.errors import CorruptFileError, UsageError
from kttools_runtime.tokenizer import Tokenizer
from tests.forge import save

VOCAB = 50


class Made:
    """A model whose logits are a fixed random table of the last token."""

    def __init__(self, seed: int, noise: float = 0.0) -> None:
        table = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(1)) * 2
        self.table = table + noise * torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed))

    def logits(self, token_ids: Any) -> torch.Tensor:
        return self.table[torch.tensor(token_ids)]


def windows() -> list[Window]:
    rng = np.random.default_rng(0)
    return [
        Window(domain, f"{domain}:{i}", tuple(int(t) for t in rng.integers(0, VOCAB, 20 + i)))
        for domain in ("a", "b")
        for i in range(12)
    ]


def log_softmax(values: np.ndarray) -> np.ndarray:
    values = values.astype(np.float64)
    return values - np.log(np.exp(values).sum(-1, keepdims=True))


def test_scores_against_numpy() -> None:
    model, reference = Made(2, 0.3), Made(0)
    tally = evaluate(model, windows(), reference, lambda _: None)
    scores = {score.domain: score for score in tally.scores()}
    assert list(scores) == ["a", "b", "all"]
    for domain in ("a", "b", "all"):
        nll, kl, agreed, count, reference_nll = 0.0, 0.0, 0, 0, 0.0
        for window in windows():
            if domain not in ("all", window.domain):
                continue
            ids = np.array(window.token_ids)
            q, p = (log_softmax(m.table.numpy()[ids[:-1]]) for m in (model, reference))
            nll -= q[np.arange(len(q)), ids[1:]].sum()
            reference_nll -= p[np.arange(len(q)), ids[1:]].sum()
            kl += (np.exp(p) * (p - q)).sum()
            agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
            count += len(q)
        score = scores[domain]
        assert score.tokens == count
        for found, expected in (
            (score.perplexity, np.exp(nll / count)),
            (score.kl, kl / count),
            (score.top1, agreed / count),
            (score.reference_perplexity, np.exp(reference_nll / count)),
        ):
            assert found is not None
            assert abs(found.value - expected) <= 1e-4 * abs(expected)
            assert found.low < found.value < found.high


def test_an_equal_model_has_no_distance() -> None:
    (score, *_) = evaluate(Made(0), windows(), Made(0), lambda _: None).scores()
    assert score.kl is not None
    assert score.top1 is not None
    assert abs(score.kl.value) <= 1e-6
    assert (score.top1.value, score.top1.low) == (1.0, 1.0)


def test_without_reference() -> None:
    score = evaluate(Made(0), windows(), None, lambda _: None).scores()[0]
    assert score.kl is None
    assert set(score.to_dict()) == {"domain", "tokens", "documents", "perplexity"}


def test_tally_keeps_documents_apart() -> None:
    tally = Tally()
    for document in ("x", "y", "x"):
        tally.add("d", document, TokenScores(torch.ones(3)))
    assert [entry.tokens for entry in tally.sums.values()] == [6, 3]
    assert compare(torch.zeros(1, 4), None, torch.tensor([2])).nll.tolist() == [0.0]


@pytest.mark.parametrize("top_k", [1, 8, VOCAB])
def test_reference_file(tmp_path: Path, top_k: int) -> None:
    reference, model, listed = Made(0), Made(2, 0.3), windows()
    answers = [
        answer_of(
            torch.log_softmax(reference.logits(w.token_ids)[:-1], -1), torch.tensor(w.token_ids[1:]), top_k
        )
        for w in listed
    ]
    write_reference(tmp_path / "r", "made", VOCAB, listed, answers)
    file = read_reference(tmp_path / "r")
    assert (file.model, file.vocab_size, file.top_k) == ("made", VOCAB, top_k)
    assert list(file.windows) == listed
    direct = evaluate(model, listed, reference, lambda _: None).scores()
    coarse = evaluate_against_file(model, file, lambda _: None).scores()
    for a, b in zip(direct, coarse, strict=True):
        assert a.kl is not None
        assert b.kl is not None
        assert b.top1 == a.top1
        assert abs(a.perplexity.value - b.perplexity.value) <= 1e-5 * a.perplexity.value
        assert b.kl.value <= a.kl.value + 1e-5
        assert b.kl.value >= (0.99 if top_k == VOCAB else 0.3 if top_k == 8 else 0.0) * a.kl.value
    same = evaluate_against_file(reference, file, lambda _: None).scores()[0]
    assert same.kl is not None
    assert abs(same.kl.value) <= 1e-5


def lie(document: dict[str, Any], tensors: dict[str, torch.Tensor], change: str) -> None:
    if change == "window of one token":
        document["windows"][0][2] = 1
    elif change == "windows of more tokens":
        document["windows"][0][2] += 1
    elif change == "negative window":
        document["windows"][0][2] = -5
    elif change == "no windows":
        document["windows"] = []
    elif change == "other version":
        document["version"] = 2
    elif change == "huge top_k":
        document["top_k"] = 2**40
    elif change == "id beyond the vocabulary":
        tensors["top_ids"][0, 0] = VOCAB
    elif change == "negative token":
        tensors["token_ids"][3] = -1
    elif change == "NaN":
        tensors["top_log_probs"][1, 1] = float("nan")
    elif change == "probability above one":
        tensors["target_log_probs"][0] = 0.5
    elif change == "probabilities of two":
        tensors["top_log_probs"][2, :2] = 0.0
    elif change == "other dtype":
        tensors["token_ids"] = tensors["token_ids"].to(torch.uint8)


LIES = {
    "window of one token": "tokens >= 2",
    "windows of more tokens": "tensor token_ids: expected I32",
    "negative window": "tokens >= 2",
    "no windows": "at least one window",
    "other version": "version must be 1",
    "huge top_k": "top_k must be a positive integer",
    "id beyond the vocabulary": "top_ids: an id is not below vocab_size 50",
    "negative token": "token_ids: an id is not below",
    "NaN": "top_log_probs: a log probability is not finite",
    "probability above one": "target_log_probs: a log probability is not finite or above 0",
    "probabilities of two": "sum to more than 1",
    "other dtype": "expected I32 .* got U8",
}


@pytest.mark.parametrize("change", LIES)
def test_hostile_reference(tmp_path: Path, change: str) -> None:
    tensors = {
        "token_ids": torch.arange(5, dtype=torch.int32),
        "top_ids": torch.arange(8, dtype=torch.int32).view(4, 2),
        "top_log_probs": torch.full((4, 2), -2.0),
        "target_log_probs": torch.full((4,), -3.0),
    }
    document: dict[str, Any] = {"format": "kttools-reference", "version": 1, "model": "m"}
    document |= {"vocab_size": VOCAB, "top_k": 2, "windows": [["d", "x", 5]]}
    save(tmp_path / "sound", tensors, {KEY: json.dumps(document)})
    assert read_reference(tmp_path / "sound").windows[0].token_ids == (0, 1, 2, 3, 4)
    lie(document, tensors, change)
    save(tmp_path / "r", tensors, {KEY: json.dumps(document)})
    with pytest.raises(CorruptFileError, match=LIES[change]):
        read_reference(tmp_path / "r")


def test_other_files_are_no_references(tmp_path: Path) -> None:
    save(tmp_path / "r", {"a": torch.zeros(1)})
    with pytest.raises(CorruptFileError, match="not a reference file"):
        read_reference(tmp_path / "r")


def test_windows(tmp_path: Path, nano_checkpoint: Path) -> None:
    text = tmp_path / "t.jsonl"
    text.write_text("\n".join(json.dumps({"text": "word " * n}) for n in (3, 40)))
    tokenizer = Tokenizer(nano_checkpoint)
    found = read_windows([f"x=jsonl:{text}"], tokenizer, 16, None)
    assert {window.domain for window in found} == {"x"}
    assert all(2 <= len(window.token_ids) <= 16 for window in found)
    whole = [i for window in found if window.document == found[-1].document for i in window.token_ids]
    expected = tokenizer.encode("word " * 40)
    assert whole == expected[: len(whole)]
    assert len(expected) - len(whole) <= 1
    with pytest.raises(UsageError, match="two data specs are of domain x"):
        read_windows([f"x=jsonl:{text}", f"x=jsonl:{text}"], tokenizer, 16, None)


def test_command(
    tmp_path: Path,
    nano_bundle: Path,
    nano_bundle_bf16: Path,
    samples_dir: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = ["--data", f"c=jsonl:{samples_dir / 'text' / 'c.jsonl'}", "--tokens", "600", "--window", "200"]
    shared = ["--quiet", "--json", "-t", "1"]
    assert main(["eval", str(nano_bundle), *data, "--reference", str(nano_bundle_bf16), *shared]) == 0
    direct = json.loads(capsys.readouterr().out)["scores"][0]
    assert 0.0 < direct["kl"]["value"] < 0.1
    assert 0.8 < direct["top1"]["value"] < 1.0
    target = tmp_path / "full.ktref"
    line = ["eval", str(nano_bundle_bf16), *data, "--write-reference", str(target), "--dtype", "float32"]
    assert main([*line, *shared]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == direct["tokens"]
    assert main([*line, *shared]) == 2
    assert main(["eval", str(nano_bundle), "--reference", str(target), *shared]) == 0
    capsys.readouterr()
    assert main(["eval", str(nano_bundle), "--reference", str(target), *shared]) == 0
    coarse = json.loads(capsys.readouterr().out)["scores"][0]
    assert coarse["top1"] == direct["top1"]
    assert 0.5 * direct["kl"]["value"] < coarse["kl"]["value"] < 1.001 * direct["kl"]["value"]
    assert main(["eval", str(nano_bundle), "--reference", str(target), *data]) == 2
    assert main(["eval", str(nano_bundle)]) == 2
    assert main(["eval", str(nano_bundle), "--reference", str(target), "--quiet", "-t", "1"]) == 0
    assert "best 64 ids and all others as one" in capsys.readouterr().out


def test_the_price_of_deferral(
    nano_bundle_bf16: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each row is what --defer-experts gives against the model without; more deferred cost more."""
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"the {word} of a long day " * 6}) + "\n" for word in "abc"))
    line = ["eval", str(nano_bundle_bf16), "--data", f"jsonl:{text}#text", "--dtype", "float32", "-t", "1"]
    device = ["--device", "cpu:0", "--prefill", "cpu", "--json", "--quiet"]
    assert main([*line, *device, "--defer-up-to", "3"]) == 0
    rows = json.loads(capsys.readouterr().out)["deferral"]
    assert [row["defer_experts"] for row in rows] == [1, 2, 3]
    kls = [row["scores"][-1]["kl"]["value"] for row in rows]
    assert 0 < kls[0] < kls[2]
    assert main([*line, *device, "--defer-experts", "3", "--reference", str(nano_bundle_bf16)]) == 0
    alone = json.loads(capsys.readouterr().out)["scores"][-1]
    assert alone["kl"]["value"] == pytest.approx(kls[2], rel=1e-3)
    assert alone["perplexity"]["value"] == pytest.approx(
        rows[2]["scores"][-1]["perplexity"]["value"], rel=1e-5
    )
    assert main([*line, "--device", "cpu:0", "--defer-up-to", "2", "--quiet"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert main([*line, "--defer-up-to", "2", "--quiet"]) == 2
    assert "needs a device" in capsys.readouterr().err
    assert main([*line, *device, "--defer-up-to", "2", "--defer-experts", "1"]) == 2
    assert "compares with MODEL itself" in capsys.readouterr().err


def test_a_checkpoint_or_gguf_as_reference(
    tmp_path: Path,
    nano_checkpoint: Path,
    nano_bundle: Path,
    nano_bundle_bf16: Path,
    samples_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """MODEL means the same everywhere: each is kept in bf16, once, with the scores of that bundle."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    gguf = tmp_path / "x.gguf"
    assert main(["convert", str(nano_checkpoint), "-o", str(gguf), "--quiet"]) == 0
    data = ["--data", f"c=jsonl:{samples_dir / 'text' / 'c.jsonl'}", "--tokens", "100"]
    line = ["eval", str(nano_bundle), *data, "--quiet", "--json", "-t", "1", "--reference"]
    scores = []
    for reference in (nano_bundle_bf16, nano_checkpoint, gguf, nano_bundle_bf16 / "bundle.json"):
        capsys.readouterr()
        assert main([*line, str(reference)]) == 0
        scores.append(json.loads(capsys.readouterr().out)["scores"])
    assert scores[1:] == scores[:1] * 3
    made = [path.name for path in (tmp_path / "cache").rglob("*-bf16") if path.is_dir()]
    assert len(made) == 2


def test_a_target_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, nano_bundle: Path, samples_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data", f"c=jsonl:{samples_dir / 'text' / 'c.jsonl'}", "--quiet"]
    for target in (tmp_path / "none" / "x.ktref", tmp_path):
        assert main(["eval", "no-such-model", *data, "--force", "--write-reference", str(target)]) == 2
        assert f"{target}: expected the name of a file in a directory that" in capsys.readouterr().err
