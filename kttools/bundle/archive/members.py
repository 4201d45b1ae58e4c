"""Which files of a bundle an archive carries, in which order, and which of them somebody wants."""

from fnmatch import fnmatchcase
from pathlib import Path

from kttools_runtime.errors import CorruptFileError, InvalidInputError
from kttools_runtime.manifest import MANIFEST_NAME, SIGNATURE_NAME, Manifest

from .layout import Member

MAX_SIGNATURE_BYTES = 1 << 20


def listed_members(
    manifest: Manifest, manifest_bytes: int, signature_bytes: int | None
) -> tuple[Member, ...]:
    """bundle.json, its signature where there is one, and the manifest's files by path."""
    members = [Member(MANIFEST_NAME, manifest_bytes)]
    if signature_bytes is not None:
        if signature_bytes > MAX_SIGNATURE_BYTES:
            raise CorruptFileError(
                f"{SIGNATURE_NAME} of {signature_bytes} bytes, expected at most {MAX_SIGNATURE_BYTES}"
            )
        members.append(Member(SIGNATURE_NAME, signature_bytes))
    members += [Member(path, entry.bytes) for path, entry in sorted(manifest.files.items())]
    return tuple(members)


def bundle_members(manifest: Manifest) -> tuple[Member, ...]:
    """Members of an archive of the bundle at manifest.root."""
    signature = manifest.root / SIGNATURE_NAME
    return listed_members(
        manifest,
        (manifest.root / MANIFEST_NAME).stat().st_size,
        signature.stat().st_size if signature.is_file() else None,
    )


def matching(members: tuple[Member, ...], patterns: tuple[str, ...], where: Path | str) -> list[str]:
    """Names that match one of the shell patterns. Raises InvalidInputError for a pattern without a match."""
    names = [member.name for member in members]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise InvalidInputError(f"{where}: no file matches {pattern!r}")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
