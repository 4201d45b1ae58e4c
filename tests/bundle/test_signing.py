"""Signatures: ours and ssh-keygen's, each checked by the other; every way a bundle is not signed."""

import base64
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from kttools.bundle import signing, trust
from kttools.bundle.signing import check_signature, read_keys, read_private_key, sign_manifest
from kttools.bundle.sshsig import BEGIN, END, parse_signature, sign
from kttools.bundle.trust import TrustPolicy
from kttools.cli import main
from kttools_runtime.errors import CorruptFileError, InvalidInputError, UsageError
from tests.bundle.test_verify import PACK, flip

PRIVATE = serialization.PrivateFormat


def write_key(folder: Path, name: str, seed: int, form: PRIVATE = PRIVATE.OpenSSH) -> Path:
    """A private key and its NAME.pub, the same for a seed; returns the private file."""
    key = Ed25519PrivateKey.from_private_bytes(bytes([seed]) * 32)
    file = folder / name
    file.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
    file.chmod(0o600)
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    file.with_suffix(".pub").write_bytes(public + f" {name}\n".encode())
    return file


@pytest.fixture
def alice(tmp_path: Path) -> Path:
    return write_key(tmp_path, "alice", 1)


@pytest.fixture
def signed_bundle(bundle: Path, alice: Path) -> Path:
    sign_manifest(bundle, read_private_key(alice))
    return bundle


@pytest.fixture(autouse=True)
def homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.chdir(tmp_path)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of a refusal with exit 3."""
    code, _, err = run(capsys, *arguments)
    assert code == 3, err
    assert len(err.splitlines()) == 1
    return err


def test_sign_and_verify(bundle: Path, alice: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "sign", bundle, "--key", alice)
    assert code == 0
    assert "signed by SHA256:" in out
    code, out, _ = run(capsys, "verify", bundle, "--signer", f"{alice}.pub")
    assert code == 0
    assert "signed by alice (SHA256:" in out
    assert "every byte checked (sha256)" in out
    assert run(capsys, "sign", bundle, "--key", alice)[0] == 2
    assert run(capsys, "sign", bundle, "--key", alice, "--force")[0] == 0


def test_changed_after_signing(signed_bundle: Path, alice: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A byte of a file, found by SHA-256; a manifest that fits the file, found by the signature."""
    from tests.bundle.conftest import shard_tensors, sign

    flip(signed_bundle / PACK, 9000)
    err = refused(capsys, "verify", signed_bundle, "--signer", f"{alice}.pub")
    assert "content changed: expected sha256" in err
    signature = (signed_bundle / "bundle.json.sig").read_bytes()
    sign(signed_bundle, shard_tensors()[1])  # writes a manifest of what is there, and removes the signature
    (signed_bundle / "bundle.json.sig").write_bytes(signature)
    err = refused(capsys, "verify", signed_bundle, "--signer", f"{alice}.pub")
    assert "changed after alice" in err
    assert refused(capsys, "verify", signed_bundle, "--trusted-keys", f"{alice}.pub") == err


def test_unknown_signer_and_missing_signature(
    signed_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bob = write_key(tmp_path, "bob", 2).with_suffix(".pub")
    assert "which is not trusted" in refused(capsys, "verify", signed_bundle, "--signer", bob)
    assert run(capsys, "verify", signed_bundle, "--trusted-keys", bob)[0] == 0
    err = refused(capsys, "verify", signed_bundle, "--trusted-keys", bob, "--require-signature")
    assert "which is not trusted" in err
    assert "no key is trusted" in refused(capsys, "verify", signed_bundle, "--require-signature")
    (signed_bundle / "bundle.json.sig").unlink()
    assert "not signed" in refused(capsys, "verify", signed_bundle, "--signer", bob)


def test_the_configuration_decides(
    signed_bundle: Path, alice: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "XDG_CONFIG_HOME/kttools"
    folder.mkdir(parents=True)
    config = folder / "kttools.toml"
    config.write_text(f'require_signature = true\ntrusted_keys = ["{alice}.pub"]\n')
    assert "signed by alice" in run(capsys, "verify", signed_bundle)[1]
    (signed_bundle / "bundle.json.sig").unlink()
    for command in (["verify", signed_bundle], ["chat", signed_bundle, "-p", "x"], ["eval", signed_bundle]):
        extra = ["--data", "x"] if command[0] == "eval" else []
        assert "not signed" in refused(capsys, *command, *extra)
    assert run(capsys, "verify", signed_bundle, "--no-require-signature")[0] == 0


@pytest.mark.parametrize(
    "line", ['trusted_keys = ["mallory.pub"]', "require_signature = false", 'signer = "x"']
)
def test_the_current_directory_says_nothing_about_trust(
    signed_bundle: Path, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bundle may hold a kttools.toml, and a user may stand in the bundle."""
    (signed_bundle / "kttools.toml").write_text(line + "\n")
    monkeypatch.chdir(signed_bundle)
    assert "may only be set in" in refused(capsys, "verify", ".")


def test_a_directory_may_ask_for_more(
    signed_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (signed_bundle / "kttools.toml").write_text("require_signature = true\n")
    monkeypatch.chdir(signed_bundle)
    assert "no key is trusted" in refused(capsys, "verify", ".")


def test_chat_reads_every_byte_once(
    signed_bundle: Path, alice: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = TrustPolicy(signers=(f"{alice}.pub",))
    seen: list[int] = []
    policy.check_bundle(signed_bundle, seen.append)
    policy.check_bundle(signed_bundle, seen.append)
    assert len(seen) == 1
    flip(signed_bundle / PACK, 9000)
    with pytest.raises(CorruptFileError, match="content changed: expected sha256"):
        policy.check_bundle(signed_bundle)
    (signed_bundle / PACK).unlink()
    with pytest.raises(InvalidInputError, match="No such file"):
        policy.check_bundle(signed_bundle)
    monkeypatch.setattr(trust, "verify_bundle", None)
    TrustPolicy().check_bundle(signed_bundle)  # nothing is asked for, nothing is read


def test_a_checkpoint_is_not_signed(nano_checkpoint: Path, alice: Path) -> None:
    with pytest.raises(InvalidInputError, match="only bundles are signed"):
        TrustPolicy(signers=(f"{alice}.pub",)).check_bundle(nano_checkpoint)


def test_ssh_keygen_agrees(signed_bundle: Path, alice: Path, tmp_path: Path) -> None:
    """An independent program accepts our signature, makes the same one, and its own is accepted here."""
    if shutil.which("ssh-keygen") is None:
        pytest.skip("ssh-keygen is not installed")
    manifest, ours = signed_bundle / "bundle.json", (signed_bundle / "bundle.json.sig").read_text()
    allowed = tmp_path / "allowed_signers"
    allowed.write_text("alice " + alice.with_suffix(".pub").read_text())
    check = ["ssh-keygen", "-Y", "verify", "-f", allowed, "-I", "alice", "-n", "kttools-bundle"]
    signature = ["-s", signed_bundle / "bundle.json.sig"]
    done = subprocess.run([*check, *signature], input=manifest.read_bytes(), capture_output=True)
    assert done.returncode == 0, done.stderr
    (signed_bundle / "bundle.json.sig").unlink()
    make = ["ssh-keygen", "-Y", "sign", "-n", "kttools-bundle", "-f", alice, manifest]
    assert subprocess.run(make, capture_output=True).returncode == 0
    assert (signed_bundle / "bundle.json.sig").read_text() == ours
    assert check_signature(signed_bundle, read_keys([str(allowed)])).name == "alice"


def test_kinds_of_keys(bundle: Path, tmp_path: Path) -> None:
    """PEM and OpenSSH, encrypted or not, and a public key as its line, a PEM file or allowed_signers."""
    pem = write_key(tmp_path, "carol", 3, PRIVATE.PKCS8)
    key = read_private_key(pem)
    encryption = serialization.BestAvailableEncryption(b"secret")
    locked = tmp_path / "locked"
    locked.write_bytes(key.private_bytes(serialization.Encoding.PEM, PRIVATE.PKCS8, encryption))
    with pytest.raises(UsageError, match="is encrypted"):
        read_private_key(locked)
    with pytest.raises(InvalidInputError, match="wrong password"):
        read_private_key(locked, b"guess")
    signer = sign_manifest(bundle, read_private_key(locked, b"secret"))
    public = tmp_path / "carol.pem"
    public.write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    line = pem.with_suffix(".pub").read_text()
    for given in (str(public), str(pem.with_suffix(".pub")), line):
        assert check_signature(bundle, read_keys([given])).key == signer.key
    other = generate_private_key(SECP256R1())
    pem.write_bytes(
        other.private_bytes(serialization.Encoding.PEM, PRIVATE.PKCS8, serialization.NoEncryption())
    )
    with pytest.raises(InvalidInputError, match="expected an ed25519 key"):
        read_private_key(pem)
    with pytest.raises(InvalidInputError, match="no private key"):
        read_private_key(public)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# nobody\n",
        "ssh-rsa AAAA x\n",
        "ssh-ed25519\n",
        "ssh-ed25519 AAAA\n",
        "ssh-ed25519 !!!!\n",
        "\xff",
        'alice namespaces="git" ssh-ed25519 AAAA\n',
        "-----BEGIN PUBLIC KEY-----\nAAAA\n",
    ],
)
def test_what_is_no_trusted_key(tmp_path: Path, text: str) -> None:
    (tmp_path / "keys").write_bytes(text.encode("latin-1"))
    with pytest.raises(InvalidInputError, match="public key"):
        read_keys([str(tmp_path / "keys")])


def blob(text: str) -> bytes:
    return base64.b64decode("".join(text.split("\n")[1:-2]))


def armoured(data: bytes) -> str:
    return f"{BEGIN}\n{base64.b64encode(data).decode()}\n{END}\n"


def test_every_flip_and_cut_of_a_signature_is_refused(signed_bundle: Path, alice: Path) -> None:
    keys = read_keys([f"{alice}.pub"])
    file = signed_bundle / "bundle.json.sig"
    data = blob(file.read_text())
    broken = [data[:count] for count in range(len(data))] + [data + b"\0"]
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << (position % 8)
        broken.append(bytes(flipped))
    for image in broken:
        file.write_text(armoured(image))
        with pytest.raises(InvalidInputError):
            check_signature(signed_bundle, keys)


@pytest.mark.parametrize(
    "text", ["", "x", f"{BEGIN}\n", f"{BEGIN}\n{END}\n", f"{BEGIN}\n\u00e9\n{END}\n", "A" * 100_000]
)
def test_what_is_no_signature(signed_bundle: Path, alice: Path, text: str) -> None:
    (signed_bundle / "bundle.json.sig").write_text(text)
    with pytest.raises(CorruptFileError, match=r"SSH signature|damaged|larger than"):
        check_signature(signed_bundle, read_keys([f"{alice}.pub"]))


def test_signed_for_something_else(bundle: Path, alice: Path) -> None:
    key = read_private_key(alice)
    text = sign((bundle / "bundle.json").read_bytes(), key, b"git")
    assert parse_signature(text, "x").is_valid((bundle / "bundle.json").read_bytes())
    (bundle / "bundle.json.sig").write_text(text)
    with pytest.raises(InvalidInputError, match="signed for another purpose"):
        check_signature(bundle, read_keys([f"{alice}.pub"]))


def test_a_signature_that_is_a_pipe(bundle: Path, alice: Path) -> None:
    os.mkfifo(bundle / "bundle.json.sig")
    with pytest.raises(InvalidInputError, match="not a regular file"):
        check_signature(bundle, read_keys([f"{alice}.pub"]))


def test_the_same_signature_every_time(bundle: Path, alice: Path) -> None:
    texts = []
    for _ in range(2):
        sign_manifest(bundle, read_private_key(alice))
        texts.append((bundle / signing.SIGNATURE_NAME).read_bytes())
    assert texts[0] == texts[1]
