"""As much of Hugging Face's hub as fetching takes, over HTTP: one repository and its commits."""

import hashlib
import json
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

REPOSITORY = "acme/sql-lora"


@dataclass
class FakeHub:
    """`revisions` name commits, and `commits` hold files. `cut_after`: bytes of each answer."""

    url: str = ""
    revisions: dict[str, str] = field(default_factory=dict[str, str])
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict[str, dict[str, bytes]])
    cut_after: int | None = None
    said_sizes: dict[str, int] = field(default_factory=dict[str, int])  # where they are wrong
    is_sure: bool = True  # gives the SHA-256 that the files have
    requests: list[str] = field(default_factory=list[str])

    def commit(self, folder: Path, revision: str = "main") -> str:
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        name = hashlib.sha1(b"".join(files.values())).hexdigest()
        self.commits[name], self.revisions[revision] = files, name
        return name

    def info(self, revision: str) -> dict[str, object] | None:
        commit = self.revisions.get(revision)
        if commit is None:
            return None
        siblings = [self._sibling(n, data) for n, data in self.commits[commit].items()]
        return {"id": REPOSITORY, "sha": commit, "siblings": siblings, "private": False}

    def _sibling(self, name: str, data: bytes) -> dict[str, object]:
        size = self.said_sizes.get(name, len(data))
        about: dict[str, object] = {"rfilename": name, "size": size, "blobId": "0" * 40}
        if name.endswith(".safetensors"):
            sha256 = hashlib.sha256(data if self.is_sure else b"other").hexdigest()
            about["lfs"] = {"sha256": sha256, "size": size, "pointerSize": 100}
        return about


@contextmanager
def running_hub() -> Generator[FakeHub, None, None]:
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(path)
            api = f"/api/models/{REPOSITORY}"
            if path == api or path.startswith(f"{api}/revision/"):
                found = hub.info(path.removeprefix(api).removeprefix("/revision/") or "main")
                self.answer(b"" if found is None else json.dumps(found).encode(), found is None)
                return
            where = path.removeprefix(f"/{REPOSITORY}/resolve/").partition("/")
            data = hub.commits.get(where[0], {}).get(where[2])
            start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").strip("-"))
            self.answer((data or b"")[start:], data is None, "Range" in self.headers)

        def answer(self, data: bytes, is_absent: bool, is_part: bool = False) -> None:
            self.send_response_only(404 if is_absent else 206 if is_part else 200)
            if is_absent:
                self.send_header("X-Error-Code", "RevisionNotFound")
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            is_file = "/resolve/" in self.path
            self.wfile.write(data[: hub.cut_after] if is_file else data)
            self.close_connection |= is_file and hub.cut_after is not None

        def log_message(self, format: str, *arguments: object) -> None:
            """Log nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
