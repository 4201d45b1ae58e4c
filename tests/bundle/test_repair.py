"""Repair: only broken files come again, verified before they replace, from a directory or a web server."""

import json
import os
import shutil
import socketserver
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from kttools.bundle import byte_source, repair
from kttools.bundle.byte_source import DirectorySource, HttpSource, open_source
from kttools.bundle.repair import BlockSupplier, repair_files
from kttools.bundle.verify import verify_bundle
from kttools.cli import main
from kttools_runtime.errors import (
    CorruptFileError,
    DownloadError,
    InvalidInputError,
    KTError,
    ResourceError,
    UsageError,
)
from tests.bundle.test_verify import PACK, SHARD, flip

TOKENIZER = "tokenizer/tokenizer.json"


class Server(socketserver.ThreadingTCPServer):
    """Files of a directory; a log of requests, and faults to plan."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root = root
        self.log: list[tuple[str, str | None]] = []
        self.has_ranges = True
        self.cut_after: int | None = None  # bytes of one answer, once
        self.status: int | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/bundle/"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.removeprefix("/bundle/")
        wanted = self.headers.get("Range")
        self.server.log.append((path, wanted))
        file = self.server.root / path
        if self.server.status or not file.is_file():
            self.send_error(self.server.status or 404)
            return
        data = file.read_bytes()
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.server.has_ranges else 0
        if start and start >= len(data):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        cut, self.server.cut_after = self.server.cut_after, None
        self.wfile.write(data[start:][:cut])
        self.close_connection = True


@pytest.fixture
def server(sound_bundle: Path) -> Iterator[Server]:
    with Server(sound_bundle) as running:
        threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield running
        running.shutdown()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repair, "FIRST_WAIT_S", 0.0)
    monkeypatch.setattr(repair, "READ_BYTES", 5000)


def damage(bundle: Path) -> list[str]:
    flip(bundle / PACK, 9000)
    (bundle / SHARD).write_bytes((bundle / SHARD).read_bytes()[:-7])
    (bundle / TOKENIZER).unlink()
    return [PACK, SHARD, TOKENIZER]


def mended(bundle: Path, sound_bundle: Path) -> bool:
    names = [path.relative_to(bundle).as_posix() for path in bundle.rglob("*")]
    assert not [name for name in names if name.endswith(".part")]
    files = [path for path in sound_bundle.rglob("*") if path.is_file()]
    return all((bundle / f.relative_to(sound_bundle)).read_bytes() == f.read_bytes() for f in files)


def test_from_a_directory(bundle: Path, sound_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = damage(bundle)
    untouched = {path: path.stat().st_ino for path in bundle.rglob("*") if path.is_file()}
    assert main(["verify", str(bundle), "--fetch", str(sound_bundle), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["repaired"] == sorted(broken)
    assert document["ok"] is True
    assert mended(bundle, sound_bundle)
    changed = {p.relative_to(bundle).as_posix() for p, inode in untouched.items() if p.stat().st_ino != inode}
    assert changed == {PACK, SHARD}


def test_nothing_is_asked_for_a_sound_bundle(bundle: Path, server: Server) -> None:
    assert main(["verify", str(bundle), "--fetch", server.url]) == 0
    assert server.log == []


@pytest.mark.parametrize("has_ranges", [True, False])
def test_from_a_server_that_breaks_off(
    bundle: Path, sound_bundle: Path, server: Server, has_ranges: bool
) -> None:
    """It goes on where it stopped; a server without ranges sends the file again, and the start is skipped."""
    server.has_ranges, server.cut_after = has_ranges, 7000
    broken = damage(bundle)
    assert main(["verify", str(bundle), "--fetch", server.url, "--quiet"]) == 0
    assert mended(bundle, sound_bundle)
    assert {path for path, _ in server.log} == set(broken)
    assert len(server.log) == len(broken) + 1
    assert [wanted for _, wanted in server.log if wanted] == ["bytes=7000-"]


def test_a_cut_off_repair_is_resumed(bundle: Path, sound_bundle: Path, server: Server) -> None:
    damage(bundle)
    part = bundle / "experts/.layer-00001.ktpack.repair.part"
    part.write_bytes((sound_bundle / PACK).read_bytes()[:6000])
    repair_files(bundle, [PACK], BlockSupplier(HttpSource(server.url)))
    assert server.log == [(PACK, "bytes=6000-")]
    flip(bundle / PACK, 1)
    part.write_bytes(b"torn by a power cut" * 20)
    server.log.clear()
    repair_files(bundle, [PACK], BlockSupplier(HttpSource(server.url)))
    assert server.log[-1] == (PACK, None)
    assert (bundle / PACK).read_bytes() == (sound_bundle / PACK).read_bytes()


def test_a_damaged_manifest(bundle: Path, sound_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(bundle)
    flip(bundle / "bundle.json", 700)
    assert main(["verify", str(bundle), "--fetch", str(sound_bundle)]) == 0
    assert "fetched again: bundle.json" in capsys.readouterr().out
    assert mended(bundle, sound_bundle)


def lie(other: Path) -> None:
    flip(other / PACK, 9001)


def shorten(other: Path) -> None:
    (other / PACK).write_bytes(b"short")


def lengthen(other: Path) -> None:
    (other / PACK).write_bytes(bytes(1 << 20))


def pipe(other: Path) -> None:
    (other / PACK).unlink()
    os.mkfifo(other / PACK)


def remove(other: Path) -> None:
    (other / PACK).unlink()


@pytest.mark.parametrize("spoil", [lie, shorten, lengthen, pipe, remove])
def test_a_source_that_is_no_better(
    bundle: Path, tmp_path: Path, spoil: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(bundle, tmp_path / "other"))
    spoil(other)
    flip(bundle / PACK, 9000)
    before = (bundle / PACK).read_bytes()
    assert main(["verify", str(bundle), "--fetch", str(other), "--quiet"]) == 3
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert (bundle / PACK).read_bytes() == before
    assert not list(bundle.rglob("*.part"))


def test_a_folder_that_leads_out(bundle: Path, sound_bundle: Path, tmp_path: Path) -> None:
    """Nothing is written outside of the bundle."""
    shutil.rmtree(bundle / "experts")
    (tmp_path / "outside").mkdir()
    (bundle / "experts").symlink_to(tmp_path / "outside")
    with pytest.raises(CorruptFileError, match="a symbolic link leads out of the bundle"):
        repair_files(bundle, [PACK], BlockSupplier(DirectorySource(sound_bundle)))
    assert list((tmp_path / "outside").iterdir()) == []


def test_a_partial_file_that_is_a_link(bundle: Path, sound_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    (bundle / "experts/.layer-00001.ktpack.repair.part").symlink_to(tmp_path / "mine")
    with pytest.raises(CorruptFileError, match="not a regular file; remove it first"):
        repair_files(bundle, [PACK], BlockSupplier(DirectorySource(sound_bundle)))
    assert (tmp_path / "mine").read_text() == "precious"


def test_a_link_in_place_of_a_file_is_replaced(bundle: Path, sound_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    (bundle / PACK).unlink()
    (bundle / PACK).symlink_to(tmp_path / "mine")
    assert main(["verify", str(bundle), "--fetch", str(sound_bundle)]) == 0
    assert (tmp_path / "mine").read_text() == "precious"
    assert not (bundle / PACK).is_symlink()


def test_servers_that_refuse(bundle: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(bundle / PACK, 9000)
    server.status = 403
    with pytest.raises(DownloadError, match="the server answers 403"):
        repair_files(bundle, [PACK], BlockSupplier(HttpSource(server.url)))
    assert len(server.log) == 1
    server.status = 503
    assert main(["verify", str(bundle), "--fetch", server.url, "--quiet"]) == 7
    assert len(server.log) == 1 + repair.ATTEMPTS
    source = HttpSource("http://127.0.0.1:9/x")
    with pytest.raises(DownloadError, match="cannot be reached"):
        source.read("a", 0, 10)


def test_an_answer_of_another_part(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for first, message in ((999_999, "got those from 999999 on"), (None, "does not say which part")):
        monkeypatch.setattr(Handler, "send_header", planted(first))
        with pytest.raises(DownloadError, match=message):
            HttpSource(server.url).read(PACK, 5, 10)


def planted(first: int | None) -> Callable[[Handler, str, str], None]:
    original = BaseHTTPRequestHandler.send_header

    def send(self: Handler, name: str, value: str) -> None:
        if name == "Content-Range":
            value = f"bytes {first}-/x" if first is not None else "nonsense"
        original(self, name, value)

    return send


def test_disk_is_counted_before_anything_is_fetched(
    bundle: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(bundle)
    usage = shutil.disk_usage(bundle)
    monkeypatch.setattr(repair.shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(ResourceError, match="not enough disk"):
        repair_files(bundle, [PACK], BlockSupplier(HttpSource(server.url)))
    assert server.log == []


def test_a_manifest_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    class Endless:
        def read(self, path: str, offset: int, size: int) -> bytes:
            return bytes(size)

    with pytest.raises(CorruptFileError, match="larger than the 20000 bytes"):
        BlockSupplier(Endless()).read_small("bundle.json", 20_000)


def test_what_is_no_source(bundle: Path, tmp_path: Path) -> None:
    for text in ("nowhere", "ftp://example.org/x", "file:///etc", str(bundle / "bundle.json")):
        with pytest.raises(UsageError, match="expected a directory with the same bundle"):
            open_source(text)
    assert main(["verify", str(bundle), "--quick", "--fetch", str(bundle)]) == 2
    assert main(["verify", str(tmp_path / "nowhere"), "--fetch", str(bundle)]) == 3


def test_two_repairs_at_once(bundle: Path, sound_bundle: Path) -> None:
    from kttools.bundle.lock import hold_directory

    damage(bundle)
    with hold_directory(bundle), pytest.raises(KTError, match="another process is writing this bundle"):
        repair_files(bundle, [PACK], BlockSupplier(DirectorySource(sound_bundle)))
    assert verify_bundle(bundle).broken == [PACK, SHARD, TOKENIZER]


def test_a_bundle_that_is_no_directory(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="no such directory"):
        repair.repair_manifest(tmp_path / "nowhere", BlockSupplier(DirectorySource(tmp_path)))
    assert byte_source.TIMEOUT_S < 120
