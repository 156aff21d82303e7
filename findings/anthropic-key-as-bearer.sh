#!/usr/bin/env bash
# The anthropic client sends api_key as a bearer token, not as x-api-key.
#
# Versions:  anthropic 2.14.0
# Expected:  Anthropic(api_key="k") sends the header x-api-key: k, as the Messages API is documented
#            and as earlier versions of the client do; auth_token="t" sends Authorization: Bearer t.
# Seen:      both send Authorization: Bearer, and there is no x-api-key. messages.create() takes no
#            temperature, top_p or top_k any more: a TypeError; they pass through extra_body.
#            (2026-11-30)
# Matters:   a server or proxy that looks for x-api-key alone answers 401 to the current client. One
#            that takes both headers has to say which counts.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check anthropic==2.14.0
"$folder/venv/bin/python" - <<'PYTHON'
import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

from anthropic import Anthropic

ANSWER = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "m",
    "content": [{"type": "text", "text": "hello"}],
    "stop_reason": "end_turn",
    "stop_sequence": None,
    "usage": {"input_tokens": 1, "output_tokens": 1},
}
for name in [name for name in os.environ if name.startswith("ANTHROPIC_")]:
    del os.environ[name]
headers = {}


class Recorder(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        headers.clear()
        headers.update({name.lower(): value for name, value in self.headers.items()})
        body = json.dumps(ANSWER).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


server = HTTPServer(("127.0.0.1", 0), Recorder)
threading.Thread(target=server.serve_forever, daemon=True).start()
ASKED = {"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]}
seen = []
for credentials in ({"api_key": "k"}, {"auth_token": "t"}):
    client = Anthropic(base_url=f"http://127.0.0.1:{server.server_port}", **credentials)
    client.messages.create(**ASKED)
    seen.append((headers.get("x-api-key"), headers.get("authorization")))
    print(f"{credentials}: x-api-key {seen[-1][0]}, authorization {seen[-1][1]}")
try:
    client.messages.create(**ASKED, temperature=0.5)
    is_taken = True
except TypeError as error:
    is_taken = False
    print(f"temperature=0.5: {error}")
if seen != [(None, "Bearer k"), (None, "Bearer t")] or is_taken:
    sys.exit("changed: this finding no longer holds")
PYTHON
