"""Signatures in the format of `ssh-keygen -Y sign` (OpenSSH, PROTOCOL.sshsig), with ed25519 keys.

A blob between two armour lines, in base64: magic, version, public key, namespace, reserved, hash, signature.
What is signed is not the message but magic, namespace, reserved, hash name and the message's hash, so that a
signature made for mail or git never passes for one of a bundle. The arithmetic is done by the package
cryptography (extra: sign).
"""

import base64
import hashlib
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from kttools_runtime.errors import CorruptFileError, UsageError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

MAGIC = b"SSHSIG"
VERSION = 1
KEY_TYPE = b"ssh-ed25519"
KEY_BYTES, SIGNATURE_BYTES = 32, 64
HASHES = {b"sha512": hashlib.sha512, b"sha256": hashlib.sha256}
BEGIN, END = "-----BEGIN SSH SIGNATURE-----", "-----END SSH SIGNATURE-----"
LINE_CHARS = 70
MAX_CHARS = 8192


@dataclass(frozen=True, slots=True)
class Signature:
    """A signature read from its file. key: the 32 bytes of the public key it claims to be made with."""

    key: bytes
    namespace: bytes
    hash_name: bytes
    signature: bytes

    def is_valid(self, message: bytes) -> bool:
        """Whether the claimed key signed the message. Raises UsageError without `cryptography`."""
        ed25519 = load_library()
        from cryptography.exceptions import InvalidSignature

        try:
            signed = _signed_bytes(self.namespace, self.hash_name, message)
            ed25519.Ed25519PublicKey.from_public_bytes(self.key).verify(self.signature, signed)
        except InvalidSignature:
            return False
        return True


def sign(message: bytes, key: "Ed25519PrivateKey", namespace: bytes) -> str:
    """The signature's file, ASCII. The same key and message give the same bytes."""
    hash_name = b"sha512"
    signature = key.sign(_signed_bytes(namespace, hash_name, message))
    public = key.public_key().public_bytes_raw()
    blob = MAGIC + struct.pack(">I", VERSION)
    blob += _string(_string(KEY_TYPE) + _string(public)) + _string(namespace) + _string(b"")
    blob += _string(hash_name) + _string(_string(KEY_TYPE) + _string(signature))
    text = base64.b64encode(blob).decode("ascii")
    lines = [text[at : at + LINE_CHARS] for at in range(0, len(text), LINE_CHARS)]
    return "\n".join([BEGIN, *lines, END]) + "\n"


def parse_signature(text: str, where: str) -> Signature:
    """Raises CorruptFileError naming `where` for anything but one ed25519 signature."""
    lines = text.split("\n")
    lines = [line.rstrip("\r") for line in lines[:-1] if line] if len(text) <= MAX_CHARS else []
    if len(lines) < 3 or lines[0] != BEGIN or lines[-1] != END:
        _broken(where, "expected an SSH signature")
    try:
        reader = _Reader(base64.b64decode("".join(lines[1:-1]).encode("ascii"), validate=True))
        magic, version = reader.take(len(MAGIC)), reader.number()
        key, namespace, _, hash_name, signature = (reader.string() for _ in range(5))
        is_whole = reader.is_at_end()
        key_type, raw_key = _pair(key)
        signature_type, raw_signature = _pair(signature)
    except ValueError:  # binascii.Error and UnicodeEncodeError are ValueErrors
        _broken(where, "damaged")
    if magic != MAGIC or version != VERSION or not is_whole:
        _broken(where, f"not an SSH signature of version {VERSION}")
    if key_type != KEY_TYPE or signature_type != KEY_TYPE or hash_name not in HASHES:
        _broken(where, "made with another kind of key or hash: expected ssh-ed25519 with sha512 or sha256")
    if len(raw_key) != KEY_BYTES or len(raw_signature) != SIGNATURE_BYTES:
        _broken(where, "key or signature of a wrong length")
    return Signature(raw_key, namespace, hash_name, raw_signature)


def public_key_blob(text: str) -> bytes:
    """The 32 bytes of the base64 word of an `ssh-ed25519` line. Raises ValueError for anything else."""
    key_type, key = _pair(base64.b64decode(text.encode("ascii"), validate=True))
    if key_type != KEY_TYPE or len(key) != KEY_BYTES:
        raise ValueError("no ed25519 key")
    return key


def key_fingerprint(key: bytes) -> str:
    """As `ssh-keygen -l` shows it: SHA256:... of a public key's 32 bytes."""
    digest = hashlib.sha256(_string(KEY_TYPE) + _string(key)).digest()
    return "SHA256:" + base64.b64encode(digest).decode("ascii").rstrip("=")


def load_library() -> Any:
    """cryptography's ed25519 module. Raises UsageError when it is not installed."""
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise UsageError('signatures need the package cryptography: pip install "kttools[sign]"') from None
    return ed25519


def _signed_bytes(namespace: bytes, hash_name: bytes, message: bytes) -> bytes:
    digest = HASHES[hash_name](message).digest()
    return MAGIC + _string(namespace) + _string(b"") + _string(hash_name) + _string(digest)


def _string(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


def _pair(data: bytes) -> tuple[bytes, bytes]:
    reader = _Reader(data)
    first, second = reader.string(), reader.string()
    if not reader.is_at_end():
        raise ValueError("trailing bytes")
    return first, second


class _Reader:
    """SSH's wire format. Raises ValueError where the bytes end too early."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def take(self, count: int) -> bytes:
        if count > len(self._data) - self._at:
            raise ValueError("ends too early")
        self._at += count
        return self._data[self._at - count : self._at]

    def number(self) -> int:
        return int.from_bytes(self.take(4), "big")

    def string(self) -> bytes:
        return self.take(self.number())

    def is_at_end(self) -> bool:
        return self._at == len(self._data)


def _broken(where: str, problem: str) -> NoReturn:
    raise CorruptFileError(f"{where}: {problem}")
