"""A stand-in of the hub's HTTP API on 127.0.0.1: enough for model repositories, with faults on demand.

It counts the bytes it serves of every file, as they go into the socket. Large files are redirected to another
host name, as the hub redirects to its storage; what arrives there must carry no token.

    python -m tests.hub.stand_in ROOT      serves ROOT/org/name/... as repositories, until it is killed
"""

import base64
import hashlib
import json
import re
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LFS_BYTES = 10_000  # larger files are LFS
BLOCK_BYTES = 32 << 10
SEND_BUFFER_BYTES = 32 << 10


@dataclass
class Faults:
    """What goes wrong. By path: cut the connection after so many bytes of an answer, one entry an answer."""

    cuts: dict[str, list[int]] = field(default_factory=dict)
    status: dict[str, list[int]] = field(default_factory=dict)  # of file requests, one entry an answer
    api_status: int = 0  # of everything
    flipped: dict[str, int] = field(default_factory=dict)  # offset of a byte that is served wrong
    shorter: dict[str, int] = field(default_factory=dict)  # a length other than listed, properly announced
    longer: dict[str, int] = field(default_factory=dict)  # bytes appended, without an announced length
    ignores_ranges: bool = False
    bytes_per_s: float = 0.0  # 0: as fast as it goes
    fails_uploads: int = 0  # so many PUTs are answered with 403


class StandIn:
    """The repositories, the counts and the faults; a context manager around the server."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}  # uploaded LFS contents by SHA-256
        self.faults = Faults()
        self.served: Counter[str] = Counter()
        self.requests: list[str] = []
        self.ranges: list[tuple[str, str]] = []
        self.storage_tokens: list[str] = []  # tokens that reached the storage host
        self.uploaded: Counter[str] = Counter()
        self.required_token = ""
        self.commits = 0
        self.lock = threading.Lock()
        stand_in = self

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # clients that die are what this is for

        class Handler(_Handler):
            hub = stand_in

        self.server = Server(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"

    def add(self, repo_id: str, folder: Path) -> None:
        """A folder's files as a repository."""
        files = (path for path in sorted(folder.rglob("*")) if path.is_file())
        self.repos[repo_id] = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}

    def commit_of(self, repo_id: str) -> str:
        """The commit is a hash of the content."""
        digest = hashlib.sha1(
            b"".join(self.object_id(data) for _, data in sorted(self.repos[repo_id].items()))
        )
        return digest.hexdigest()

    @staticmethod
    def object_id(data: bytes) -> bytes:
        return hashlib.sha256(data).digest()

    @contextmanager
    def running(self) -> Iterator["StandIn"]:
        thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.server.shutdown()
            self.server.server_close()

    def reset_counts(self) -> None:
        self.served.clear()
        self.requests.clear()
        self.ranges.clear()
        self.uploaded.clear()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: StandIn

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._route("GET")

    def do_HEAD(self) -> None:
        self._route("HEAD")

    def do_POST(self) -> None:
        self._route("POST")

    def do_PUT(self) -> None:
        self._route("PUT")

    def _route(self, method: str) -> None:
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        with self.hub.lock:
            self.hub.requests.append(f"{method} {path}")
        if self.hub.faults.api_status:
            self._json({"error": "made to fail"}, self.hub.faults.api_status)
            return
        for pattern, name in ROUTES:
            match = re.fullmatch(pattern, path)
            if match:
                self._query = parse_qs(parts.query)
                getattr(self, name)(*match.groups())
                return
        self._json({"error": f"no route {path}"}, 404)

    # ---- the API

    def _known(self, repo_id: str, revision: str = "main") -> dict[str, bytes] | None:
        token = self.hub.required_token
        if token and self.headers.get("Authorization") != f"Bearer {token}":
            self._json({"error": "Invalid username or password."}, 401)
            return None
        if repo_id not in self.hub.repos:
            self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            return None
        if revision not in ("main", self.hub.commit_of(repo_id)):
            self._json({"error": "no revision"}, 404, {"X-Error-Code": "RevisionNotFound"})
            return None
        return self.hub.repos[repo_id]

    def _info(self, repo_id: str, revision: str = "main") -> None:
        files = self._known(repo_id, revision)
        if files is not None:
            siblings = [{"rfilename": path} for path in files]
            self._json({"id": repo_id, "sha": self.hub.commit_of(repo_id), "siblings": siblings})

    def _tree(self, repo_id: str, revision: str) -> None:
        files = self._known(repo_id, revision)
        if files is None:
            return
        entries = []
        for path, data in files.items():
            oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            entry: dict[str, Any] = {"type": "file", "oid": oid, "size": len(data), "path": path}
            if len(data) > LFS_BYTES:
                sha256 = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 130}
            entries.append(entry)
        self._json(entries)

    def _resolve(self, repo_id: str, revision: str, path: str) -> None:
        files = self._known(repo_id, revision)
        if files is None:
            return
        if path not in files:
            self._json({"error": "no file"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        if len(files[path]) > LFS_BYTES:
            location = f"http://localhost:{self.hub.port}/storage/{repo_id}/{path}"
            self._send(b"", 302, {"Location": location})
        else:
            self._file(path, files[path])

    def _storage(self, repo_id: str, path: str) -> None:
        token = self.headers.get("Authorization")
        if token:
            self.hub.storage_tokens.append(token)
        self._file(path, self.hub.repos[repo_id][path])

    def _create(self) -> None:
        body = self._body_json()
        name = f"{body['organization']}/{body['name']}"
        status = 409 if name in self.hub.repos else 200
        self.hub.repos.setdefault(name, {})
        self._json({"url": f"{self.hub.endpoint}/{name}", "name": name}, status)

    def _preupload(self, repo_id: str, _revision: str) -> None:
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["size"] > LFS_BYTES else "regular",
                "shouldIgnore": False,
            }
            for file in self._body_json()["files"]
        ]
        self._json({"files": modes})

    def _batch(self, repo_id: str) -> None:
        stored = {hashlib.sha256(data).hexdigest() for data in self.hub.repos[repo_id].values()}
        answers = []
        for item in self._body_json()["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in stored | set(self.hub.objects):
                href = f"{self.hub.endpoint}/upload/{item['oid']}"
                answer["actions"] = {"upload": {"href": href, "header": {}}}
            answers.append(answer)
        self._json({"transfer": "basic", "objects": answers})

    def _upload(self, oid: str) -> None:
        data = self._body()
        with self.hub.lock:
            if self.hub.faults.fails_uploads:
                self.hub.faults.fails_uploads -= 1
                self._json({"error": "made to fail"}, 403)
                return
            self.hub.uploaded[oid] += len(data)
            self.hub.objects[hashlib.sha256(data).hexdigest()] = data
        self._json({})

    def _commit(self, repo_id: str, _revision: str) -> None:
        files = self.hub.repos[repo_id]
        for line in self._body().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
                self.hub.uploaded[value["path"]] += len(files[value["path"]])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        self.hub.commits += 1
        oid = self.hub.commit_of(repo_id)
        self._json({"commitUrl": f"{self.hub.endpoint}/{repo_id}/commit/{oid}", "commitOid": oid})

    # ---- bytes

    def _file(self, path: str, data: bytes) -> None:
        faults = self.hub.faults
        statuses = faults.status.get(path)
        if statuses:
            self._json({"error": "made to fail"}, statuses.pop(0))
            return
        if path in faults.flipped:
            wrong = bytearray(data)
            wrong[faults.flipped[path]] ^= 1
            data = bytes(wrong)
        data = data[: faults.shorter.get(path, len(data))]
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(match[1]) if match and not faults.ignores_ranges else 0
        if match:
            self.hub.ranges.append((path, self.headers["Range"]))
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self.send_response(206 if start else 200)
        body = data[start:] + bytes(faults.longer.get(path, 0))
        if path in faults.longer:
            self.close_connection = True
            headers["Connection"] = "close"
        else:
            headers["Content-Length"] = str(len(body))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self._serve(path, body)

    def _serve(self, path: str, body: bytes) -> None:
        """Counts what the socket took; its buffer is small, so that this is nearly what the client got."""
        cuts = self.hub.faults.cuts.get(path)
        end = min(cuts.pop(0), len(body)) if cuts else len(body)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        for begin in range(0, end, BLOCK_BYTES):
            block = body[begin : min(begin + BLOCK_BYTES, end)]
            if self.hub.faults.bytes_per_s:
                time.sleep(len(block) / self.hub.faults.bytes_per_s)
            self.wfile.write(block)
            self.wfile.flush()
            with self.hub.lock:
                self.hub.served[path] += len(block)
        if end < len(body):
            self.close_connection = True

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length")
        if length is not None:
            return self.rfile.read(int(length))
        data = b""  # chunked
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _body_json(self) -> Any:
        return json.loads(self._body())

    def _json(self, document: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(
            json.dumps(document).encode(), status, {"Content-Type": "application/json", **(headers or {})}
        )

    def _send(self, data: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


REPO = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    (r"/api/repos/create", "_create"),
    (rf"/api/models/{REPO}/preupload/([^/]+)", "_preupload"),
    (rf"/api/models/{REPO}/commit/([^/]+)", "_commit"),
    (rf"/api/models/{REPO}/revision/([^/]+)", "_info"),
    (rf"/api/models/{REPO}/tree/([^/]+)", "_tree"),
    (rf"/api/models/{REPO}", "_info"),
    (rf"/{REPO}\.git/info/lfs/objects/batch", "_batch"),
    (rf"/{REPO}/resolve/([^/]+)/(.+)", "_resolve"),
    (rf"/storage/{REPO}/(.+)", "_storage"),
    (r"/upload/([0-9a-f]{64})", "_upload"),
]


def serve(root: Path) -> None:
    """For use by hand: prints the endpoint and serves ROOT/org/name."""
    hub = StandIn()
    for folder in sorted(root.glob("*/*")):
        if folder.is_dir():
            hub.add(folder.relative_to(root).as_posix(), folder)
    print(f"HF_ENDPOINT={hub.endpoint}", flush=True)
    hub.server.serve_forever()


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
