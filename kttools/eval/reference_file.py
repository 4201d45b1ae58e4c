"""A model's answers in a file: what it predicted for given tokens, small enough to ship without the model.

A safetensors file (checked like any other). Metadata `kttools_reference`: JSON with format, version,
vocab_size, top_k, model (free text) and windows, a list of [domain, document, tokens]. Tensors, for the N
predicted tokens of all windows in order: `token_ids` [M] i32 (M = all tokens), `top_ids` [N, k] i32 best
first, `top_log_probs` [N, k] f32, `target_log_probs` [N] f32. The probability of all other ids is what the
top ones leave.

The KL from such a reference sums over the top k and one rest: at most the KL over the whole vocabulary, and
the closer the smaller the rest.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from kttools.bundle.atomic import atomic_write_bytes
from kttools_runtime import strict_json
from kttools_runtime.errors import CorruptFileError
from kttools_runtime.safetensors_file import read_header, read_tensor

from .scores import TokenScores
from .windows import MIN_TOKENS, Window

KEY, FORMAT, VERSION = "kttools_reference", "kttools-reference", 1
TOP_K = 64
DTYPES = {"token_ids": "I32", "top_ids": "I32", "top_log_probs": "F32", "target_log_probs": "F32"}
# Probabilities that do not sum to one by more than rounding are no probabilities.
SLACK = 1e-3


@dataclass(frozen=True, slots=True)
class Answer:
    """What the reference said in one window: [T - 1, k] ids and log probabilities, [T - 1] of the targets."""

    top_ids: Tensor
    top_log_probs: Tensor
    target_log_probs: Tensor

    def compare(self, log_q: Tensor, targets: Tensor) -> TokenScores:
        """log_q: [T - 1, vocab_size] of the model. KL over the top k and the rest."""
        p = self.top_log_probs
        q = log_q.gather(1, self.top_ids)
        tail_p, tail_q = _tail(p), _tail(q)
        kl = (p.exp() * (p - q)).sum(-1) + tail_p * (tail_p.clamp(min=1e-30).log() - tail_q.log())
        agreed = (self.top_ids[:, 0] == log_q.argmax(-1)).float()
        nll = -log_q.gather(1, targets[:, None])[:, 0]
        return TokenScores(nll, kl, agreed, -self.target_log_probs)


@dataclass(frozen=True, slots=True)
class Reference:
    """A checked file, opened: windows in order, and an answer for each."""

    model: str
    vocab_size: int
    top_k: int
    windows: tuple[Window, ...]
    tensors: dict[str, Tensor]

    def answers(self) -> Iterator[Answer]:
        begin = 0
        for window in self.windows:
            rows = slice(begin, begin + window.predicted)
            begin += window.predicted
            ids = self.tensors["top_ids"][rows].to(torch.int64)
            yield Answer(ids, self.tensors["top_log_probs"][rows], self.tensors["target_log_probs"][rows])


def answer_of(log_p: Tensor, targets: Tensor, top_k: int = TOP_K) -> Answer:
    """What a file keeps of [T - 1, vocab_size] log probabilities."""
    values, ids = log_p.topk(min(top_k, log_p.shape[1]), dim=-1)
    return Answer(ids, values, log_p.gather(1, targets[:, None])[:, 0])


def write_reference(
    path: Path, model: str, vocab_size: int, windows: Sequence[Window], answers: Sequence[Answer]
) -> None:
    """Raises KTError or ResourceError when the file cannot be written."""
    tensors = {
        "token_ids": torch.tensor([i for window in windows for i in window.token_ids], dtype=torch.int32),
        "top_ids": torch.cat([answer.top_ids for answer in answers]).to(torch.int32),
        "top_log_probs": torch.cat([answer.top_log_probs for answer in answers]),
        "target_log_probs": torch.cat([answer.target_log_probs for answer in answers]),
    }
    document = {
        "format": FORMAT,
        "version": VERSION,
        "model": model,
        "vocab_size": vocab_size,
        "top_k": tensors["top_ids"].shape[1],
        "windows": [[window.domain, window.document, len(window.token_ids)] for window in windows],
    }
    # Not save_file: it would put a file of its own in the place of the one that is locked.
    data = save({name: t.contiguous() for name, t in tensors.items()}, {KEY: json.dumps(document)})
    atomic_write_bytes(path, data)


def read_reference(path: Path) -> Reference:
    """Raises InvalidInputError (not readable) or CorruptFileError (a rule is broken)."""
    header = read_header(path)
    if KEY not in header.metadata:
        raise CorruptFileError(f"{path}: no metadata {KEY}: not a reference file")
    document = strict_json.parse(header.metadata[KEY].encode(), f"{path}: {KEY}")
    sizes = _checked_sizes(path, document)
    windows = _checked_windows(path, document["windows"])
    tokens = sum(tokens for _, _, tokens in windows)
    predicted = tokens - len(windows)
    shapes = {
        "token_ids": (tokens,),
        "top_ids": (predicted, sizes["top_k"]),
        "top_log_probs": (predicted, sizes["top_k"]),
        "target_log_probs": (predicted,),
    }
    tensors: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        info = header.tensors.get(name)
        if info is None or info.shape != shape or info.dtype != DTYPES[name]:
            got = f"{info.dtype} {list(info.shape)}" if info else "nothing"
            raise CorruptFileError(f"{path}: tensor {name}: expected {DTYPES[name]} {list(shape)}, got {got}")
        tensors[name] = read_tensor(info)
    _check_values(path, tensors, sizes["vocab_size"])
    return Reference(
        document["model"],
        sizes["vocab_size"],
        sizes["top_k"],
        tuple(_windows(windows, tensors["token_ids"].tolist())),
        tensors,
    )


def _checked_sizes(path: Path, document: Any) -> dict[str, int]:
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise CorruptFileError(f"{path}: {KEY}.format must be {FORMAT!r}")
    if document.get("version") != VERSION:
        raise CorruptFileError(
            f"{path}: {KEY}.version must be {VERSION}, got {document.get('version')!r:.40}"
        )
    if not isinstance(document.get("model"), str):
        raise CorruptFileError(f"{path}: {KEY}.model must be a string")
    sizes = {name: document.get(name) for name in ("vocab_size", "top_k")}
    for name, value in sizes.items():
        if type(value) is not int or not 1 <= value < 2**31:
            raise CorruptFileError(f"{path}: {KEY}.{name} must be a positive integer, got {value!r:.40}")
    return {name: int(value) for name, value in sizes.items() if value is not None}


def _checked_windows(path: Path, listed: Any) -> list[tuple[str, str, int]]:
    if not isinstance(listed, list) or not listed:
        raise CorruptFileError(f"{path}: {KEY}.windows must be a list with at least one window")
    for index, entry in enumerate(listed):
        is_entry = isinstance(entry, list) and [type(item) for item in entry] == [str, str, int]
        if not is_entry or not MIN_TOKENS <= entry[2] < 2**31:
            raise CorruptFileError(f"{path}: {KEY}.windows[{index}] must be [domain, document, tokens >= 2]")
    return [(domain, document, tokens) for domain, document, tokens in listed]


def _check_values(path: Path, tensors: dict[str, Tensor], vocab_size: int) -> None:
    for name in ("token_ids", "top_ids"):
        ids = tensors[name]
        if bool(((ids < 0) | (ids >= vocab_size)).any()):
            raise CorruptFileError(f"{path}: tensor {name}: an id is not below vocab_size {vocab_size}")
    for name in ("top_log_probs", "target_log_probs"):
        if not bool((tensors[name] <= SLACK).all()) or not bool(torch.isfinite(tensors[name]).all()):
            raise CorruptFileError(f"{path}: tensor {name}: a log probability is not finite or above 0")
    if not bool((tensors["top_log_probs"].exp().sum(-1) <= 1 + SLACK).all()):
        raise CorruptFileError(f"{path}: tensor top_log_probs: probabilities of a token sum to more than 1")


def _windows(listed: list[tuple[str, str, int]], token_ids: list[int]) -> Iterator[Window]:
    begin = 0
    for domain, document, tokens in listed:
        yield Window(domain, document, tuple(token_ids[begin : begin + tokens]))
        begin += tokens


def _tail(log_probs: Tensor) -> Tensor:
    """The probability that the listed ids leave; at least what float32 can tell from none."""
    return (1.0 - log_probs.double().exp().sum(-1)).clamp(min=1e-9).float()
