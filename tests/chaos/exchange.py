"""Sends a case over a connection of its own, and checks that the answer is one of the API's."""

import asyncio
import http.client
import io
import json
from dataclasses import dataclass
from typing import Any, cast

from tests.chaos.case import Case

PATIENCE_S = 180.0  # for a whole answer: long beside all that a case may ask for
CHUNK = 2**16
# What HAProxy answers itself, before any of ours has seen the request
FOREIGN = b"<html><body><h1>4"


@dataclass(frozen=True, slots=True)
class Answer:
    """`status` is 0 without an answer, of which `body` then says why."""

    status: int
    body: bytes
    content_type: str = ""
    is_whole: bool = True

    @property
    def is_foreign(self) -> bool:
        return self.body.startswith(FOREIGN)


async def exchange(port: int, case: Case) -> Answer:
    """Send the case and read until the connection ends, or until the client of the case leaves."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                raw = await _talk(reader, writer, case)
            finally:
                if case.is_abandoned:
                    writer.transport.abort()
                else:
                    writer.close()
    except TimeoutError:
        return Answer(0, b"no answer in time")
    except OSError as error:
        return Answer(0, repr(error).encode())
    return _parse(raw, case.method)


async def _talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, case: Case) -> bytes:
    writer.write(case.raw())
    if case.num_sent is not None:
        await asyncio.sleep(0.02)
        return b""
    received = bytearray()
    sending = asyncio.ensure_future(writer.drain())
    try:
        while chunk := await reader.read(CHUNK):
            received += chunk
            if case.leaves_after is not None and received.count(b"\ndata: ") >= case.leaves_after:
                break
    except ConnectionError:
        if not received:
            raise
    finally:
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
    return bytes(received)


class _Received:
    """What http.client wants of a socket."""

    def __init__(self, raw: bytes) -> None:
        self._raw = raw

    def makefile(self, mode: str) -> io.BytesIO:
        return io.BytesIO(self._raw)


def _parse(raw: bytes, method: str) -> Answer:
    response = http.client.HTTPResponse(cast(Any, _Received(raw)), method=method)
    try:
        response.begin()
    except (http.client.HTTPException, ValueError) as error:
        return Answer(0, repr(error).encode() + raw[:200], is_whole=False)
    try:
        body, is_whole = response.read(), True
    except http.client.IncompleteRead as error:
        body, is_whole = error.partial, False
    return Answer(response.status, body, response.getheader("content-type", ""), is_whole)


# ==== what is wrong with an answer ====


def problem(case: Case, answer: Answer) -> str | None:
    """Say which promise the answer breaks; None if it keeps them all."""
    if answer.status >= 500:
        return f"status {answer.status}"
    if answer.status == 0:
        may_be_silent = case.is_abandoned or not case.is_http
        return None if may_be_silent else f"no answer: {answer.body[:200]!r}"
    if case.is_abandoned or (answer.is_foreign and not case.is_http):
        return None
    if not answer.is_whole:
        return "the answer was cut"
    if answer.status >= 400:
        return None if case.method == "HEAD" or _is_error(answer) else "an error that is not JSON"
    if answer.content_type.startswith("text/event-stream"):
        return _stream_problem(answer.body)
    return None


def _is_error(answer: Answer) -> bool:
    """Whether it is an error as one of the APIs has them."""
    try:
        document = json.loads(answer.body)
        fields = set(document)
        if fields == {"success", "error_message", "loaded_adapters"}:  # SGLang's
            message = document["error_message"]
        elif fields == {"error", "error_type"}:  # LoRAX's
            message = document["error"]
        elif fields == {"type", "error"}:  # Anthropic's
            message = document["error"]["message"]
        else:
            error = document["error"]
            is_ours = set(error) == {"message", "type", "param", "code"}
            message = error["message"] if is_ours else None
    except (ValueError, KeyError, TypeError):
        return False
    is_json = answer.content_type.startswith("application/json")
    return is_json and isinstance(message, str) and bool(message)


def _stream_problem(body: bytes) -> str | None:
    *events, last = body.split(b"\n\n")
    if last or not events:
        return "the stream ends amid an event"
    parts = [_data(event) for event in events if not event.startswith(b":")]
    *before, end = parts
    if any(_error_of(part) for part in before[:-1]):
        return "an error before the end"
    failed = _error_of(end) or (_error_of(before[-1]) if before else None)
    if failed is not None:
        kind = failed if isinstance(failed, str) else failed["type"]
        is_fault = kind in FAULTS
        return f"an error event: {events[-1][:200]!r}" if is_fault else None
    is_end = end == b"[DONE]" or _is_last(json.loads(end))
    return None if is_end else "the stream has no end"


FAULTS = ("server_error", "api_error", "internal_error", "incomplete_generation")
LAST = ("message_stop", "response.completed", "response.incomplete")


def _data(event: bytes) -> bytes:
    """Return what an event carries, whether it has a name or not."""
    return (
        event.rpartition(b"data:")[2].strip() if event.startswith(b"event:") else event[5:].strip()
    )


def _error_of(part: bytes) -> Any:
    """Return the error that an event tells, in the form of its API."""
    if part == b"[DONE]":
        return None
    document = json.loads(part)
    if document.get("type") == "error" and "error" not in document:
        return document["code"]  # of responses
    if "error_type" in document:
        return document["error_type"]
    return document.get("error")


def _is_last(document: dict[str, Any]) -> bool:
    return document.get("type") in LAST or document.get("generated_text") is not None
