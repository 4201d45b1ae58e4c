"""What signatures the user asks for, and whether a bundle that is about to be used meets it.

A signature covers bundle.json, and through it the SHA-256 of every file: so before a bundle that must be
signed is used, all its bytes are read once. That they were is remembered in the cache directory, until a file
changes.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from kttools.dirs import cache_dir
from kttools_runtime.errors import InvalidInputError
from kttools_runtime.manifest import MANIFEST_NAME, SIGNATURE_NAME, Manifest, read_manifest

from .atomic import atomic_write_bytes
from .hashing import OnBytes
from .signing import PublicKey, check_signature, read_keys
from .verify import verify_bundle


@dataclass(frozen=True, slots=True)
class TrustPolicy:
    """signers: keys of which one must have signed; trusted: keys that may; as files or lines (see read_keys).

    is_required: without `signers`, one of `trusted` must have signed.
    """

    is_required: bool = False
    signers: tuple[str, ...] = ()
    trusted: tuple[str, ...] = ()

    @property
    def needs_signature(self) -> bool:
        return self.is_required or bool(self.signers)

    def check_manifest(self, bundle: Path) -> PublicKey | None:
        """Who signed the manifest; None where no signature is asked for and there is none to be checked.

        A signature that a trusted key made counts even when none is asked for: a broken one raises. Raises
        as check_signature and read_keys.
        """
        keys = read_keys(self.signers or self.trusted)
        if self.needs_signature:
            return check_signature(bundle, keys)
        if not keys or not (bundle / SIGNATURE_NAME).exists():
            return None
        try:
            return check_signature(bundle, keys)
        except InvalidInputError as error:
            if type(error) is InvalidInputError:  # an unknown signer: nobody asked
                return None
            raise

    def check_bundle(
        self, bundle: Path, on_start: OnBytes | None = None, on_bytes: OnBytes | None = None
    ) -> None:
        """Where a signature is asked for: checks it and every byte. Raises InvalidInputError and its kin."""
        if not self.needs_signature:
            return
        if not (bundle / MANIFEST_NAME).is_file():
            raise InvalidInputError(
                f"{bundle}: a signature is required and this is no bundle; only bundles are signed"
            )
        self.check_manifest(bundle)
        manifest = read_manifest(bundle)
        stamp = cache_dir() / "verified" / _state(manifest)
        if stamp.exists():
            return
        verify_bundle(bundle, hash="sha256", on_start=on_start, on_bytes=on_bytes).raise_on_problems()
        stamp.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_bytes(stamp, f"{bundle.resolve()}\n".encode("utf-8", "replace"))


def _state(manifest: Manifest) -> str:
    """Hex name of the manifest and of its files as the file system has them: inode, size, times of change."""
    digest = hashlib.sha256(manifest.manifest_sha256.encode())
    for path in sorted(manifest.files):
        try:
            status = (manifest.root / path).stat()
        except OSError as error:
            raise InvalidInputError(f"{manifest.root / path}: {error.strerror}; run kttools verify") from None
        facts = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        digest.update(f"{path}\0{facts}\n".encode())
    return digest.hexdigest()
