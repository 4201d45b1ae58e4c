"""Whether a pack is the one its manifest means: a sound file can still be another layer's or model's."""

from collections.abc import Iterator

from .errors import CorruptFileError
from .manifest import Manifest
from .pack import PackHeader, read_pack_header


def check_pack(manifest: Manifest, layer: int) -> None:
    """Reads the pack's header. Raises CorruptFileError where it disagrees with bundle.json."""
    path = manifest.expert_path(layer)
    for problem in pack_problems(read_pack_header(path), manifest, layer):
        raise CorruptFileError(f"{path}: {problem}; run kttools verify")


def pack_problems(header: PackHeader, manifest: Manifest, layer: int) -> Iterator[str]:
    """What the header says of layer, shape, number and formats of experts that the manifest does not."""
    model = manifest.model
    expected = {
        "layer": layer,
        "num_experts": manifest.pack_experts,
        "hidden_size": model.hidden_size,
        "moe_intermediate_size": model.moe_intermediate_size,
    }
    for key, value in expected.items():
        if getattr(header, key) != value:
            yield f"{key}: expected {value} by bundle.json, got {getattr(header, key)}"
    expert = manifest.expert_file(layer)
    if header.formats != (expert.formats or (expert.format,) * header.num_experts):
        got = ", ".join(sorted(set(header.formats)))
        yield f"format: expected {', '.join(expert.names)} by bundle.json, got {got}"
