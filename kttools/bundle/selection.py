"""Which part of a bundle somebody wants, and the manifest of that part.

A layer is its routed experts' pack, 97 % of the bytes of such a model. Everything else (attention, norms,
tokenizer, tables) is small, every layer of it lies in the same shards, and goes along whole.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from kttools_runtime.errors import UsageError
from kttools_runtime.manifest import PARTIAL, SHARE, ExpertFile, Manifest, Subset

from .hashing import FileDigest
from .manifest import build_manifest, manifest_parts

MAX_NUMBER = 1 << 20


@dataclass(frozen=True, slots=True)
class Selection:
    """layers: of the packs to take; experts: ids to take of each. None: all."""

    layers: tuple[int, ...] | None = None
    experts: tuple[int, ...] | None = None


def parse_numbers(text: str, what: str) -> tuple[int, ...]:
    """ "3-10,12" as ascending numbers. Raises UsageError."""
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,7})\s*(?:-\s*(\d{1,7})\s*)?", part, re.ASCII)
        if match is None:
            raise UsageError(f"{what}: expected numbers and ranges such as 3-10,12, got {text!r:.80}")
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < MAX_NUMBER:
            raise UsageError(f"{what}: {part.strip()!r} is not an ascending range below {MAX_NUMBER}")
        found.update(range(first, last + 1))
    return tuple(sorted(found))


def node_experts(text: str, num_experts: int) -> tuple[int, ...]:
    """The experts of node I of N, "I/N": contiguous, as even as can be. Raises UsageError.

    Whole experts, not strips of each: PACK.md has no pack with a part of an expert, because a pack must not
    depend on how many nodes will read it.
    """
    match = re.fullmatch(r"(\d{1,3})/(\d{1,3})", text, re.ASCII)
    node, nodes = (int(match[1]), int(match[2])) if match else (0, 0)
    if not node < nodes <= num_experts:
        raise UsageError(f"--node: expected I/N with I below N and N at most {num_experts}, got {text!r:.40}")
    return tuple(expert for expert in range(num_experts) if expert * nodes // num_experts == node)


def choose(manifest: Manifest, layers: str | None, experts: str | None, node: str | None) -> Selection:
    """A selection from options, held against the bundle. Raises UsageError for what it does not have."""
    count = manifest.model.n_routed_experts
    if experts is not None and node is not None:
        raise UsageError("--experts and --node are both given: use one of them")
    chosen = parse_numbers(experts, "--experts") if experts is not None else None
    chosen = node_experts(node, count) if node is not None else chosen
    if chosen is not None and SHARE in manifest.requires:
        raise UsageError(f"{manifest.root}: holds a share of the experts already; cut the whole bundle")
    if chosen is not None and chosen[-1] >= count:
        raise UsageError(f"--experts: {chosen[-1]} is beyond the {count} experts of this model")
    if chosen is not None and len(chosen) == count:
        chosen = None
    return Selection(_layers(manifest, layers), chosen)


def _layers(manifest: Manifest, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    asked = parse_numbers(text, "--layers")
    if asked[-1] >= manifest.model.num_hidden_layers:
        raise UsageError(f"--layers: {asked[-1]} is beyond the {manifest.model.num_hidden_layers} layers")
    found = tuple(layer for layer in asked if layer in manifest.experts)
    if not found:
        raise UsageError(f"--layers {text}: no pack of such a layer; there are {_span(manifest)}")
    return None if set(found) == set(manifest.experts) else found


def chosen_experts(manifest: Manifest, selection: Selection) -> dict[int, ExpertFile]:
    """The packs of a selection, their formats cut to the chosen experts."""
    layers = sorted(manifest.experts) if selection.layers is None else selection.layers
    packs = {layer: manifest.experts[layer] for layer in layers}
    if selection.experts is None:
        return packs
    chosen = selection.experts
    return {
        layer: ExpertFile.of(pack.file, [pack.formats[e] if pack.formats else pack.format for e in chosen])
        for layer, pack in packs.items()
    }


def chosen_files(manifest: Manifest, selection: Selection) -> list[str]:
    """Paths of the files of a selection, bundle.json not among them."""
    packs = {expert.file for expert in manifest.experts.values()}
    wanted = {expert.file for expert in chosen_experts(manifest, selection).values()}
    return [path for path in sorted(manifest.files) if path not in packs or path in wanted]


def subset_manifest(
    manifest: Manifest, selection: Selection, changed: dict[str, FileDigest] | None = None
) -> bytes:
    """bundle.json of a part, which says what it was cut from. changed: hashes of files written anew."""
    parts = manifest_parts(manifest)
    kept = chosen_files(manifest, selection)
    experts = chosen_experts(manifest, selection)
    requires = set(manifest.requires)
    requires |= {PARTIAL} if len(experts) < len(manifest.model.moe_layers) else set()
    requires |= {SHARE} if selection.experts is not None else set()
    subset = manifest.subset or Subset(manifest.manifest_sha256)
    if selection.experts is not None:
        subset = replace(subset, experts=selection.experts)
    parts |= {
        "experts": experts,
        "files": {path: parts["files"][path] for path in kept} | (changed or {}),
        "requires": tuple(sorted(requires)),
        "subset": subset,
    }
    return build_manifest(**parts)


def _span(manifest: Manifest) -> str:
    layers = sorted(manifest.experts)
    return f"layers {layers[0]} to {layers[-1]}" if layers else f"none in {Path(manifest.root).name}"
