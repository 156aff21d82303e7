"""Decode request bodies, with a bound on the work that one body may cause.

Decoding runs on the event loop and keeps the GIL. Text and numbers decode at hundreds of MiB per
second; it is nested values that are slow to build, so their number is limited before.
"""

import re

import msgspec

from deployments.ingress.http_errors import ApiError, invalid

MAX_NESTED = 50_000  # objects, lists and fields of objects in one body
MAX_STRINGS = 100_000

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_STRING = re.compile(rb'"(?:[^"\\]+|\\.)*+"', re.DOTALL)
_HALF_PAIR = re.compile(
    rb"(?<!\\)(?:\\\\)*+"
    rb"(?:(\\u[dD][89abAB][0-9a-fA-F]{2})(?!\\u[dD][c-fC-F])"
    rb"|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})(\\u[dD][c-fC-F][0-9a-fA-F]{2}))"
)
_POSITION = re.compile(r"\(byte (\d+)\)")
_AROUND = 32  # bytes around the position of an error, in which an escape may begin or end
_SMALL = 2**20  # bytes of a body in which a field is looked for


def decode_json(body: bytes) -> object:
    """Decode UTF-8 JSON. Raises ApiError."""
    body = body.removeprefix(_BYTE_ORDER_MARK)
    _check_nesting(body)
    try:
        return msgspec.json.decode(body)
    except (ValueError, RecursionError) as error:
        half = _half_pair(body, str(error))
        raise half or invalid(f"The body is not valid JSON: {error}") from None


def _check_nesting(body: bytes) -> None:
    """Count what is slow to decode. What is inside strings is not, and costs a second look."""
    if body.count(b'"') - body.count(b'\\"') > 2 * MAX_STRINGS:
        raise invalid(f"The body has more than {MAX_STRINGS} texts and names of fields.")
    if _num_nested(body) > MAX_NESTED and _num_nested(_STRING.sub(b"", body)) > MAX_NESTED:
        raise invalid(f"The body has more than {MAX_NESTED} objects, lists and fields.")


def _num_nested(body: bytes) -> int:
    return body.count(b"[") + body.count(b"{") + body.count(b":")


def _half_pair(body: bytes, error: str) -> ApiError | None:
    """Explain half of a surrogate pair, which clients send that cut a text inside an emoji."""
    position = _POSITION.search(error)
    at = len(body) if position is None else int(position[1])
    found = _HALF_PAIR.search(body, max(0, at - _AROUND), at + _AROUND)
    if found is None:
        return None
    field = _field_around(body, found)
    half = (found[1] or found[2]).decode()
    return invalid(
        f"{field or 'The body'} has half of a surrogate pair, {half}, which is no character: a "
        "text was probably cut in the middle of one.",
        field,
    )


def _field_around(body: bytes, half: re.Match[bytes]) -> str | None:
    """Find the field of the body in which this half of a pair is."""
    if len(body) > _SMALL:
        return None
    mark = b"\\ufdd0"
    start, end = half.span(1) if half[1] else half.span(2)
    whole = _without_halves(body[:start]) + mark + _without_halves(body[end:])
    try:
        fields = msgspec.json.decode(whole, type=dict[str, msgspec.Raw])
    except (ValueError, RecursionError):
        return None
    return next((name for name, raw in fields.items() if mark in bytes(raw)), None)


def _without_halves(text: bytes) -> bytes:
    return _HALF_PAIR.sub(b"", text)
