#!/usr/bin/env bash
# The openai client raises no exception for an error event in a stream of responses.
#
# Versions:  openai 3.51.0
# Expected:  an error in the middle of a stream raises APIError, in responses as in chat completions.
# Seen:      a chat's `data: {"error": {...}}` raises APIError. In a stream of responses the error
#            event in its documented form ({"type": "error", "code", "message", ...}) is yielded like
#            any other event, and the loop ends as if nothing had happened; only an event of that
#            name with a key "error" raises. (2026-11-30)
# Matters:   a client that only adds up the deltas takes half an answer for a whole one. It has to look
#            for events of type error, response.failed and response.incomplete itself.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check openai==3.51.0
"$folder/venv/bin/python" - <<'PYTHON'
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

from openai import APIError, OpenAI

DOCUMENTED = {
    "type": "error",
    "code": "server_error",
    "message": "the engine died",
    "param": None,
    "sequence_number": 0,
}
NESTED = {"error": {"type": "server_error", "message": "the engine died"}}
reply = [b""]


class Server(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Content-Length", str(len(reply[0])))
        self.end_headers()
        self.wfile.write(reply[0])

    def log_message(self, *_: object) -> None:
        pass


server = HTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
client = OpenAI(base_url=f"http://127.0.0.1:{server.server_port}/v1", api_key="k", max_retries=0)


def ask_chat() -> list[str]:
    messages = [{"role": "user", "content": "hi"}]
    stream = client.chat.completions.create(model="m", messages=messages, stream=True)
    return [chunk.object for chunk in stream]


def ask_responses() -> list[str]:
    return [e.type for e in client.responses.create(model="m", input="hi", stream=True)]


def outcome(ask, head: str, data: dict) -> object:
    reply[0] = f"{head}data: {json.dumps(data)}\n\n".encode()
    try:
        return ask()
    except APIError as error:
        return f"APIError: {error.message}"


seen = {
    "chat": outcome(ask_chat, "", NESTED),
    "responses, documented": outcome(ask_responses, "event: error\n", DOCUMENTED),
    "responses, key error": outcome(ask_responses, "event: error\n", NESTED),
}
for name, value in seen.items():
    print(f"{name}: {value}")
raised = "APIError: the engine died"
wanted = [raised, ["error"], raised]
if list(seen.values()) != wanted:
    sys.exit("changed: this finding no longer holds")
PYTHON
