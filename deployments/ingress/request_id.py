"""Name requests: by the client's own x-request-id, or by a new one."""

import re
import uuid
from collections.abc import Awaitable
from typing import cast

from starlette.types import Message, Scope, Send

HEADER = "x-request-id"
_NAME = HEADER.encode()
_RULE = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")  # printable: it is written to logs
_KEY = "reef.request_id"


def request_id(scope: Scope) -> str:
    """Return the request's id. One that is no safe text, or that comes twice, is replaced."""
    if _KEY not in scope:
        given = [value for name, value in scope["headers"] if name == _NAME]
        is_safe = len(given) == 1 and _RULE.fullmatch(given[0])
        scope[_KEY] = given[0].decode() if is_safe else str(uuid.uuid4())
    return cast(str, scope[_KEY])


def with_request_id(scope: Scope, send: Send) -> Send:
    """Wrap `send` such that the answer has the id, at the cost of one plain call per message."""
    header = (_NAME, request_id(scope).encode())

    def send_with_id(message: Message) -> Awaitable[None]:
        if message["type"] == "http.response.start":
            # A list of its own: others may share theirs.
            message = {**message, "headers": [*message.get("headers", ()), header]}
        return send(message)

    return cast(Send, send_with_id)


def without_body(send: Send) -> Send:
    """Wrap `send` such that the answer has no body, as one to HEAD."""

    def send_head(message: Message) -> Awaitable[None]:
        if message["type"] == "http.response.body":
            message = {**message, "body": b""}
        return send(message)

    return cast(Send, send_head)
