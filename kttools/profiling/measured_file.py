"""What was measured of a policy, kept on disk: a run that was cut off measures nothing twice.

A file's name is a hash of all that decides its content: model, windows and policy.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from kttools.bundle.atomic import atomic_write_bytes
from kttools_runtime import strict_json

from .layerwise import Policies, Window
from .measure import DocumentSums, Measured

SUMS = ("tokens", "kl", "nll", "nll_full", "top1", "overlap")


def windows_digest(chosen: Sequence[Window]) -> str:
    """SHA-256 (hex) of what is measured on."""
    digest = hashlib.sha256()
    for window in chosen:
        digest.update(f"{window.domain}\n{window.document}\n{len(window.token_ids)}\n".encode())
        digest.update(window.token_ids.numpy().tobytes())
    return digest.hexdigest()


def policies_digest(policies: Policies) -> str:
    """SHA-256 (hex) of rules by layer; floats count to the last bit."""
    rows = {str(index): _fields(policy) for index, policy in policies.items()}
    return hashlib.sha256(strict_json.canonical(rows)).hexdigest()


class MeasuredFiles:
    """Measurements on fixed windows of one model, in a directory."""

    def __init__(self, directory: Path, fingerprint: str, chosen: Sequence[Window]) -> None:
        self.directory, self.fingerprint = directory, fingerprint
        self._given = f"{fingerprint}\n{windows_digest(chosen)}\n"

    def part(self, chosen: Sequence[Window]) -> "MeasuredFiles":
        """The same directory and model, other windows."""
        return MeasuredFiles(self.directory, self.fingerprint, chosen)

    def get(self, policies: Policies) -> Measured | None:
        """None where nothing was measured, or the file is not readable (it is then measured again)."""
        try:
            with safe_open(str(self._path(policies)), "np") as file:
                facts = json.loads((file.metadata() or {})["kttools"])
                return _unpack(facts, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, ValueError):
            return None

    def put(self, policies: Policies, measured: Measured) -> None:
        facts, arrays = _pack(measured)
        path = self._path(policies)
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_bytes(path, save(arrays, metadata={"kttools": json.dumps(facts)}))

    def _path(self, policies: Policies) -> Path:
        key = hashlib.sha256((self._given + policies_digest(policies)).encode()).hexdigest()
        return self.directory / f"{key[:32]}.safetensors"


def _fields(policy: Any) -> dict[str, Any]:
    values = {name: getattr(policy, name) for name in policy.__dataclass_fields__}
    return {n: v.tolist() if isinstance(v, torch.Tensor) else v for n, v in values.items()}


def _pack(measured: Measured) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    rows = measured.documents
    facts = {
        "documents": [[d.domain, d.document] for d in rows],
        "kept": {domain: {str(i): n for i, n in kept.items()} for domain, kept in measured.kept.items()},
        "positions": measured.positions,
        "pieces": {domain: [len(piece) for piece in kl] for domain, kl in measured.token_kl.items()},
        "seconds": measured.seconds,
    }
    arrays = {name: np.array([getattr(d, name) for d in rows], dtype=np.float64) for name in SUMS}
    for domain, pieces in measured.token_kl.items():
        arrays[f"token_kl.{domain}"] = torch.cat(pieces).numpy()
    return facts, arrays


def _unpack(facts: dict[str, Any], arrays: dict[str, np.ndarray]) -> Measured:
    columns = [arrays[name].tolist() for name in SUMS]
    documents = [
        DocumentSums(domain, name, int(tokens), *sums)
        for (domain, name), tokens, *sums in zip(facts["documents"], *columns, strict=True)
    ]
    token_kl = {
        domain: list(torch.from_numpy(arrays[f"token_kl.{domain}"]).split(lengths))
        for domain, lengths in facts["pieces"].items()
    }
    kept = {domain: {int(i): n for i, n in rows.items()} for domain, rows in facts["kept"].items()}
    return Measured(documents, token_kl, kept, facts["positions"], facts["seconds"])
