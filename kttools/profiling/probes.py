"""Probe documents: a small sample that travels with the profile, so that tables are made without the data.

The sample keeps the documents with the smallest hashes: of any union of shards it is the same sample.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from .layerwise import Window

# Tokens a probe document keeps, and tokens kept per domain.
PROBE_DOCUMENT_TOKENS = 512
PROBE_DOMAIN_TOKENS = 8192
Arrays = dict[str, np.ndarray]


def sample(chosen: Sequence[Window]) -> Arrays:
    """The probe part of a shard's windows: the first window of each document competes."""
    first: dict[tuple[str, str], Window] = {}
    for window in chosen:
        first.setdefault((window.domain, window.document), window)
    cut = PROBE_DOCUMENT_TOKENS
    return _pack([(w.domain, w.document, w.token_ids[:cut].numpy()) for w in first.values()])


def merge_probes(parts: Sequence[Arrays]) -> Arrays:
    """The sample of a union, from the samples of its parts."""
    return _pack([row for part in parts for row in _unpack(part)])


def probe_windows(trace: Arrays) -> list[Window]:
    """The sample as windows, sorted by domain and hash."""
    rows = _unpack(trace)
    return [Window(d, name, torch.from_numpy(ids.astype(np.int64))) for d, name, ids in rows]


def _pack(rows: Sequence[tuple[str, str, np.ndarray]]) -> Arrays:
    ordered = sorted(rows, key=lambda row: (row[0], _hash(row[0], row[1]), row[1]))
    kept, tokens = [], dict.fromkeys((row[0] for row in ordered), 0)
    for row in ordered:
        if tokens[row[0]] < PROBE_DOMAIN_TOKENS:
            tokens[row[0]] += len(row[2])
            kept.append(row)
    names = "\n".join(f"{domain}\t{name}" for domain, name, _ in kept).encode()
    return {
        "tokens": np.concatenate([ids.astype(np.int32) for *_, ids in kept] or [np.zeros(0, np.int32)]),
        "lengths": np.array([len(ids) for *_, ids in kept], dtype=np.int64),
        "names": np.frombuffer(names, dtype=np.uint8).copy(),
    }


def _unpack(part: Arrays) -> list[tuple[str, str, np.ndarray]]:
    if not len(part["lengths"]):
        return []
    names = [line.split("\t", 1) for line in part["names"].tobytes().decode().split("\n")]
    pieces = np.split(part["tokens"], np.cumsum(part["lengths"])[:-1])
    return [(domain, name, ids) for (domain, name), ids in zip(names, pieces, strict=True)]


def _hash(domain: str, name: str) -> str:
    return hashlib.sha256(f"{domain}\n{name}".encode()).hexdigest()
