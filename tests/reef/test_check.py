"""`reef check`, against a server that knows the answers or does not."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from reef.__main__ import main

ANSWERS = {"one": "1", "two": "2"}


@contextmanager
def serving(knows: bool, status: int = 200) -> Iterator[str]:
    """A server whose adapter `sql` has learned the answers; the base has not."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            (message,) = body["messages"]
            is_right = knows and body["model"] == "sql"
            text = ANSWERS[message["content"]] if is_right else "?"
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps({"choices": [{"message": {"content": text}}]}).encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.fixture
def demo(tmp_path: Path) -> str:
    examples = [{"prompt": prompt, "answer": answer} for prompt, answer in ANSWERS.items()]
    (tmp_path / "heldout.json").write_text(json.dumps({"sql": examples}))
    return str(tmp_path)


def test_adapters_that_have_learned_pass(demo: str, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(knows=True) as url:
        assert main(["check", f"{url}/", "--demo", demo]) == 0
    assert capsys.readouterr().out == "sql        adapter 100.0%   base   0.0%   of 2 prompts\n"


def test_adapters_that_have_not_are_status_1(demo: str) -> None:
    with serving(knows=False) as url:
        assert main(["check", url, "--demo", demo]) == 1


def test_a_server_that_refuses_is_a_refusal(demo: str, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(knows=True, status=404) as url:
        assert main(["check", url, "--demo", demo]) == 2
    error = capsys.readouterr().err
    assert url in error and "404" in error and error.count("\n") == 1


def test_no_server_is_a_refusal(demo: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "http://127.0.0.1:1", "--demo", demo]) == 2
    error = capsys.readouterr().err
    assert "http://127.0.0.1:1" in error and error.count("\n") == 1
