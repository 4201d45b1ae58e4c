"""What a bundle's formats cost: KL, top-1 agreement and perplexity per domain, against the float32 reference.

    python benchmarks/quality.py --reference BF16_BUNDLE --corpora DIR [--split test] BUNDLE [BUNDLE ...]

The reference is a bundle of bf16 packs and shards computed in float32; it agrees with transformers in float32
to a KL of 1e-12 (tests/runtime/test_reference.py). Bundles run in the default dtype. Text: the documents of
each `<domain>.<split>.jsonl` (key `text`), each from its beginning-of-sentence token, in one stream cut into
windows; a window predicts all its tokens but the first. Prints a Markdown table, or one JSON document
(--json).
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

import kttools_runtime as kt
from kttools_runtime.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Score:
    """One bundle on one domain. kl: mean nats per token; top1: share of equal most likely tokens."""

    bundle: str
    domain: str
    tokens: int
    kl: float
    top1: float
    perplexity: float
    reference_perplexity: float


def windows(tokenizer: Tokenizer, corpus: Path, window_tokens: int, num_tokens: int) -> list[Tensor]:
    """The first num_tokens of a corpus in pieces of window_tokens (the last may be shorter)."""
    stream: list[int] = []
    with corpus.open(encoding="utf-8") as lines:
        for line in lines:
            stream += tokenizer.encode(json.loads(line)["text"])
            if len(stream) >= num_tokens:
                break
    pieces = torch.tensor(stream[:num_tokens]).split(window_tokens)
    return [piece for piece in pieces if len(piece) > 1]


class Totals:
    """Sums over windows of one domain."""

    def __init__(self) -> None:
        self.tokens = 0
        self.kl = self.agreed = self.loss = self.reference_loss = 0.0

    def add(self, window: Tensor, log_p: Tensor, log_q: Tensor) -> None:
        """log_p (reference) and log_q: [T, vocab_size] log probabilities of one window."""
        targets = window[1:, None]
        self.tokens += len(window) - 1
        self.kl += float((log_p.exp() * (log_p - log_q)).sum(-1)[:-1].double().sum())
        self.agreed += float((log_p.argmax(-1) == log_q.argmax(-1))[:-1].sum())
        self.loss -= float(log_q[:-1].gather(1, targets).double().sum())
        self.reference_loss -= float(log_p[:-1].gather(1, targets).double().sum())

    def score(self, bundle: str, domain: str) -> Score:
        n = self.tokens

        def perplexity(loss: float) -> float:
            return float(torch.tensor(loss / n).exp())

        return Score(
            bundle=bundle,
            domain=domain,
            tokens=n,
            kl=self.kl / n,
            top1=self.agreed / n,
            perplexity=perplexity(self.loss),
            reference_perplexity=perplexity(self.reference_loss),
        )


def measure(
    reference: kt.Model, bundles: dict[str, kt.Model], domain: str, pieces: list[Tensor]
) -> list[Score]:
    totals = {name: Totals() for name in bundles}
    for window in pieces:
        log_p = torch.log_softmax(reference.logits(window), dim=-1)
        for name, model in bundles.items():
            totals[name].add(window, log_p, torch.log_softmax(model.logits(window), dim=-1))
    return [total.score(name, domain) for name, total in totals.items()]


def mean_scores(scores: list[Score]) -> Iterator[Score]:
    """Per bundle, the mean of the domains (perplexity: geometric)."""
    for bundle in dict.fromkeys(score.bundle for score in scores):
        mine = [score for score in scores if score.bundle == bundle]

        def mean(key: str, rows: list[Score] = mine) -> float:
            return sum(getattr(score, key) for score in rows) / len(rows)

        def geometric(key: str, rows: list[Score] = mine) -> float:
            return float(torch.tensor([getattr(score, key) for score in rows]).log().mean().exp())

        yield Score(
            bundle=bundle,
            domain="mean",
            tokens=sum(score.tokens for score in mine),
            kl=mean("kl"),
            top1=mean("top1"),
            perplexity=geometric("perplexity"),
            reference_perplexity=geometric("reference_perplexity"),
        )


def table(scores: list[Score]) -> str:
    lines = ["| bundle | domain | tokens | KL | top-1 | perplexity | reference |", "|--|--|--|--|--|--|--|"]
    for s in scores:
        cells = (s.bundle, s.domain, f"{s.tokens}", f"{s.kl:.5f}", f"{100 * s.top1:.2f} %")
        lines.append(f"| {' | '.join(cells)} | {s.perplexity:.3f} | {s.reference_perplexity:.3f} |")
    return "\n".join(lines)


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument(
        "--reference", required=True, type=Path, help="a bundle of bf16 packs and bf16 shards"
    )
    parser.add_argument("--corpora", required=True, type=Path, help="folder of <domain>.<split>.jsonl")
    parser.add_argument("--split", default="test", help="empty: <domain>.jsonl")
    parser.add_argument("--tokens", default=8192, type=int, help="tokens per domain")
    parser.add_argument("--window", default=512, type=int)
    parser.add_argument("--threads", default=None, type=int)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    pattern = f"*.{options.split}.jsonl" if options.split else "*.jsonl"
    corpora = sorted(options.corpora.glob(pattern))
    if not corpora:
        sys.exit(f"{options.corpora}: no {pattern}")
    reference = kt.load(options.reference, dtype="float32", threads=options.threads)
    bundles = {path.name: kt.load(path, threads=options.threads) for path in options.bundles}
    scores: list[Score] = []
    for corpus in corpora:
        started = time.perf_counter()
        pieces = windows(reference.tokenizer, corpus, options.window, options.tokens)
        scores += measure(reference, bundles, corpus.name.split(".")[0], pieces)
        print(f"{corpus.name}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
    scores += mean_scores(scores)
    scores.sort(key=lambda score: list(bundles).index(score.bundle))
    machine = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
    if options.json:
        print(
            json.dumps({**machine, "window": options.window, "scores": [asdict(s) for s in scores]}, indent=1)
        )
    else:
        print(table(scores))


if __name__ == "__main__":
    main()
