"""Shards and profiles on disk: safetensors with a JSON header, written whole or not at all.

A shard holds the statistics of some documents of one domain; a profile is the sum of shards in sorted order,
so it does not depend on which machine made which shard, nor on the order they are merged in.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from kttools.bundle.atomic import atomic_write_bytes
from kttools.bundle.hashing import sha256_file
from kttools_runtime import strict_json
from kttools_runtime.errors import CorruptFileError, InvalidInputError
from kttools_runtime.version import __version__

from .probes import merge_probes

FORMAT, SHARD_FORMAT, VERSION = "kttools-expert-profile", "kttools-expert-profile-shard", 1
PROFILE_NAME, SIDECAR_NAME = "profile.expert-profile.json", "profile.safetensors"
SHARD_KEYS = {
    "format",
    "version",
    "id",
    "domain",
    "documents",
    "tokens",
    "text_sha256",
    "fingerprint",
    "model",
    "router",
    "provenance",
    "window_tokens",
    "gram_every",
}
TOOL = {"name": "kttools", "version": __version__}
PROBE = "probe."
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Shard:
    """header: see SHARD_KEYS. stats: by name, first axis the MoE layers. probe: sampled documents' tokens."""

    header: dict[str, Any]
    stats: Arrays
    probe: Arrays


@dataclass(frozen=True, slots=True)
class Profile:
    """A merged profile. stats[domain][name]; trace: the probe documents (see kttools.profiling.probes)."""

    header: dict[str, Any]
    stats: dict[str, Arrays]
    trace: Arrays

    def pooled(self) -> Arrays:
        """Over all domains: sums added, maxima taken."""
        total: Arrays = {}
        for domain in sorted(self.stats):
            _add(total, self.stats[domain])
        return total


def write_shard(path: Path, shard: Shard) -> None:
    """Raises ResourceError or KTError when it cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = shard.stats | {PROBE + name: value for name, value in shard.probe.items()}
    header = strict_json.canonical(shard.header).decode("ascii")
    atomic_write_bytes(path, save(_contiguous(tensors), metadata={"kttools": header}))


def read_shard(path: Path) -> Shard:
    """Raises CorruptFileError: not a shard, unknown keys, statistics that are not finite numbers."""
    tensors, metadata = _read_safetensors(path)
    header = strict_json.parse(metadata.get("kttools", "null").encode(), str(path))
    if not isinstance(header, dict) or header.get("format") != SHARD_FORMAT or set(header) != SHARD_KEYS:
        raise CorruptFileError(f"{path}: not a profile shard of this version")
    probe = {name[len(PROBE) :]: v for name, v in tensors.items() if name.startswith(PROBE)}
    stats = {name: v for name, v in tensors.items() if not name.startswith(PROBE)}
    _check_finite(stats, path)
    return Shard(header, stats, probe)


def merge(paths: Iterable[Path], output: Path) -> Profile:
    """Adds shards up and writes the profile into the directory `output`.

    Raises InvalidInputError: no shards, a shard twice, shards of different models or settings.
    """
    shards: dict[str, tuple[Shard, Path]] = {}
    for path in paths:
        shard = read_shard(path)
        name = shard.header["id"]
        if name in shards:
            raise InvalidInputError(f"{path}: shard {name} is already there as {shards[name][1]}")
        shards[name] = shard, path
    if not shards:
        raise InvalidInputError(f"{output}: no shards to merge; run kttools profile-experts collect first")
    profile = _sum([shards[name] for name in sorted(shards)])
    return write_profile(output, profile)


def write_profile(output: Path, profile: Profile) -> Profile:
    """The sidecar first, then the JSON that names its hash; returns the profile as written."""
    output.mkdir(parents=True, exist_ok=True)
    tensors = {f"{d}/{name}": v for d, stats in profile.stats.items() for name, v in stats.items()}
    tensors |= {PROBE + name: value for name, value in profile.trace.items()}
    data = save(_contiguous(tensors))
    atomic_write_bytes(output / SIDECAR_NAME, data)
    sidecar = {"file": SIDECAR_NAME, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    header = profile.header | {"sidecar": sidecar}
    atomic_write_bytes(output / PROFILE_NAME, strict_json.canonical(header))
    return Profile(header, profile.stats, profile.trace)


def read_profile(path: Path) -> Profile:
    """A profile by its JSON file or its directory. Raises InvalidInputError, CorruptFileError."""
    path = path / PROFILE_NAME if path.is_dir() else path
    header = strict_json.read_object(path)
    if header.get("format") != FORMAT or header.get("version") != VERSION:
        raise InvalidInputError(f"{path}: not an expert profile of version {VERSION}")
    sidecar = header.get("sidecar")
    if not isinstance(sidecar, dict) or not isinstance(sidecar.get("file"), str) or "/" in sidecar["file"]:
        raise CorruptFileError(f"{path}: sidecar must name a file beside it")
    beside = path.parent / sidecar["file"]
    if sha256_file(beside) != sidecar.get("sha256"):
        raise CorruptFileError(f"{beside}: is not the file {path.name} was written with; merge again")
    tensors, _ = _read_safetensors(beside)
    trace = {name[len(PROBE) :]: v for name, v in tensors.items() if name.startswith(PROBE)}
    stats: dict[str, Arrays] = {}
    for name, value in tensors.items():
        if not name.startswith(PROBE):
            domain, _, short = name.partition("/")
            stats.setdefault(domain, {})[short] = value
    for arrays in stats.values():
        _check_finite(arrays, beside)
    return Profile(header, stats, trace)


def _sum(shards: list[tuple[Shard, Path]]) -> Profile:
    first = shards[0][0].header
    stats: dict[str, Arrays] = {}
    domains: dict[str, dict[str, Any]] = {}
    for shard, path in shards:
        own = shard.header
        for key in ("fingerprint", "window_tokens", "gram_every", "router"):
            if own[key] != first[key]:
                raise InvalidInputError(f"{path}: {key} differs from {shards[0][1]}: profiles do not mix")
        _add(stats.setdefault(own["domain"], {}), shard.stats)
        domain = domains.setdefault(
            own["domain"], {"documents": 0, "tokens": 0, "provenance": own["provenance"]}
        )
        domain["documents"] += own["documents"]
        domain["tokens"] += own["tokens"]
    listed = ("id", "domain", "documents", "tokens", "text_sha256")
    header = {
        "format": FORMAT,
        "version": VERSION,
        "tool": TOOL,
        "fingerprint": first["fingerprint"],
        "model": first["model"],
        "router": first["router"],
        "domains": domains,
        "shards": [{key: shard.header[key] for key in listed} for shard, _ in shards],
        "statistics": {
            name: {"shape": list(value.shape), "dtype": "F64"}
            for name, value in sorted(next(iter(stats.values())).items())
        },
        "lru_sizes": first["router"]["lru_sizes"],
        "recording": {"window_tokens": first["window_tokens"], "gram_every": first["gram_every"]},
    }
    return Profile(header, stats, merge_probes([s.probe for s, _ in shards]))


def _add(total: Arrays, more: Arrays) -> None:
    for name, value in more.items():
        if name not in total:
            total[name] = value.copy()
        elif name.startswith("max_"):
            np.maximum(total[name], value, out=total[name])
        else:
            total[name] += value


def _contiguous(tensors: Arrays) -> Arrays:
    return {name: np.ascontiguousarray(value) for name, value in sorted(tensors.items())}


def _read_safetensors(path: Path) -> tuple[Arrays, dict[str, str]]:
    try:
        with safe_open(str(path), "np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except FileNotFoundError:
        raise InvalidInputError(f"{path}: no such file") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise CorruptFileError(f"{path}: not a readable safetensors file: {error}") from None


def _check_finite(stats: Arrays, path: Path) -> None:
    for name, value in stats.items():
        if value.dtype != np.float64 or not np.isfinite(value).all():
            raise CorruptFileError(f"{path}: {name} holds values that are not finite 64-bit numbers")
