"""Who made this bundle: a detached signature of bundle.json (bundle.json.sig) and the keys the user trusts.

The manifest lists the SHA-256 of every file, so a signature of it vouches for all of them; that they are
those files is found by `verify`, which uses SHA-256 whenever a signature counts.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kttools_runtime.errors import CorruptFileError, InvalidInputError, UsageError
from kttools_runtime.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, SIGNATURE_NAME
from kttools_runtime.strict_json import read_bounded

from .atomic import atomic_write_bytes
from .sshsig import MAX_CHARS, key_fingerprint, load_library, parse_signature, public_key_blob, sign

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

NAMESPACE = b"kttools-bundle"
MAX_KEY_BYTES = 1 << 20
KEY_WORD = "ssh-ed25519"


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A key and whom the user knows it as."""

    key: bytes
    name: str

    def __str__(self) -> str:
        return f"{self.name} ({key_fingerprint(self.key)})" if self.name else key_fingerprint(self.key)


def read_keys(given: Sequence[str]) -> list[PublicKey]:
    """Trusted keys, each given as a file or as its own line `ssh-ed25519 AAAA... name`.

    A file holds such lines (id_ed25519.pub, or allowed_signers with the name in front; # begins a comment),
    or one PEM public key. Raises InvalidInputError for what is no key: a typing error must not mean "nobody".
    """
    keys: list[PublicKey] = []
    for text in given:
        if KEY_WORD in text.split():
            keys.append(_key_of_line(text, "trusted key"))
        else:
            keys += _keys_of_file(Path(text).expanduser())
    return keys


def read_private_key(path: Path, password: bytes | None = None) -> "Ed25519PrivateKey":
    """An unencrypted or encrypted OpenSSH or PEM (PKCS 8) file. Raises InvalidInputError or UsageError.

    UsageError with "is encrypted" in it means: come again with the password.
    """
    ed25519 = load_library()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization

    data = read_bounded(path, MAX_KEY_BYTES)
    is_ssh = b"BEGIN OPENSSH PRIVATE KEY" in data
    load: Any = serialization.load_ssh_private_key if is_ssh else serialization.load_pem_private_key
    try:
        key = load(data, password)
    except TypeError:  # how the library says that a password is missing, or was given for nothing
        raise UsageError(f"{path}: the key is encrypted, and no password was given") from None
    except (ValueError, UnsupportedAlgorithm) as error:
        reason = (
            "wrong password, or no private key" if password else "no private key in OpenSSH or PEM format"
        )
        raise InvalidInputError(f"{path}: {reason} ({str(error) or type(error).__name__:.100})") from None
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise InvalidInputError(f"{path}: expected an ed25519 key; ssh-keygen -t ed25519 makes one")
    return key


def sign_manifest(bundle: Path, key: "Ed25519PrivateKey") -> PublicKey:
    """Writes bundle.json.sig; returns the signer's public key."""
    data = read_bounded(bundle / MANIFEST_NAME, MAX_MANIFEST_BYTES)
    atomic_write_bytes(bundle / SIGNATURE_NAME, sign(data, key, NAMESPACE).encode("ascii"))
    return PublicKey(key.public_key().public_bytes_raw(), "")


def check_signature(bundle: Path, trusted: Sequence[PublicKey]) -> PublicKey:
    """The trusted key that signed this manifest.

    Raises InvalidInputError (no signature, an unknown signer, nobody is trusted) or CorruptFileError (the
    manifest was changed after it was signed).
    """
    file = bundle / SIGNATURE_NAME
    if not trusted:
        raise InvalidInputError(
            f"{bundle}: a signature is required but no key is trusted: name one with --signer, or as"
            " trusted_keys in the configuration file"
        )
    if not os.path.lexists(file):
        raise InvalidInputError(
            f"{bundle}: not signed ({SIGNATURE_NAME} is missing), a signature is required"
        )
    try:
        text = read_bounded(file, MAX_CHARS).decode("ascii")
    except UnicodeDecodeError:
        raise CorruptFileError(f"{file}: expected an SSH signature") from None
    signature = parse_signature(text, str(file))
    if signature.namespace != NAMESPACE:
        raise InvalidInputError(
            f"{file}: signed for another purpose, expected the namespace {NAMESPACE.decode()}"
        )
    signer = next((key for key in trusted if key.key == signature.key), None)
    if signer is None:
        raise InvalidInputError(f"{file}: signed by {key_fingerprint(signature.key)}, which is not trusted")
    if not signature.is_valid(read_bounded(bundle / MANIFEST_NAME, MAX_MANIFEST_BYTES)):
        raise CorruptFileError(
            f"{bundle / MANIFEST_NAME}: changed after {signer} signed it, or the signature is damaged"
        )
    return signer


def _keys_of_file(path: Path) -> list[PublicKey]:
    data = read_bounded(path, MAX_KEY_BYTES)
    if b"BEGIN PUBLIC KEY" in data:
        return [_pem_key(data, path)]
    try:
        lines = [line.strip() for line in data.decode("utf-8").splitlines()]
    except UnicodeDecodeError:
        lines = []
    keys = [_key_of_line(line, str(path)) for line in lines if line and not line.startswith("#")]
    if not keys:
        raise InvalidInputError(f"{path}: holds no {KEY_WORD} public key")
    return keys


def _key_of_line(line: str, where: str) -> PublicKey:
    """`ssh-ed25519 AAAA... name` or `name ssh-ed25519 AAAA...`."""
    words = line.split()
    at = words.index(KEY_WORD) if KEY_WORD in words else -1
    try:
        if at not in (0, 1):
            raise ValueError("options, or another kind of key")
        key = public_key_blob(words[at + 1])
    except (ValueError, IndexError):
        raise InvalidInputError(f"{where}: no {KEY_WORD} public key: {line!r:.80}") from None
    name = words[0] if at else " ".join(words[2:])
    return PublicKey(key, name if name.isprintable() else "")


def _pem_key(data: bytes, path: Path) -> PublicKey:
    ed25519 = load_library()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise InvalidInputError(f"{path}: holds no ed25519 public key")
    return PublicKey(key.public_bytes_raw(), path.stem)
