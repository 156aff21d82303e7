"""Read request bodies: within a time and a size, inflated where they are compressed."""

import asyncio
import zlib
from collections.abc import Iterator, Sequence

from starlette.requests import Request as HttpRequest

from deployments.ingress.http_errors import (
    body_too_large,
    body_too_slow,
    invalid,
    unknown_encoding,
)

BODY_TIMEOUT_S = 60.0
SLICE = 256 * 1024  # bytes that are inflated before others have a turn
_GZIP_FORMAT = 16 + zlib.MAX_WBITS


async def read_body(http_request: HttpRequest, max_bytes: int) -> bytes:
    """Read the body. Stops at the limits, whatever length the client announced.

    The size limit holds for the bytes as they came, and for those that are inflated of them.
    """
    gunzip = _decoder(http_request.headers.getlist("content-encoding"))
    pieces: list[bytes] = []
    num_read = num_kept = 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in http_request.stream():
                num_read += len(chunk)
                for piece in (chunk,) if gunzip is None else gunzip.push(chunk):
                    num_kept += len(piece)
                    if max(num_read, num_kept) > max_bytes:
                        raise body_too_large(max_bytes)
                    pieces.append(piece)
                    if len(piece) == SLICE:
                        await asyncio.sleep(0)
    except TimeoutError:
        raise body_too_slow(BODY_TIMEOUT_S) from None
    if gunzip is not None:
        gunzip.check_end()
    return b"".join(pieces)


def _decoder(headers: Sequence[str]) -> "Gunzip | None":
    """Choose how to decode by the Content-Encoding. None: there is nothing to do."""
    codings = [name.strip().lower() for header in headers for name in header.split(",")]
    codings = [name for name in codings if name not in ("", "identity")]
    if not codings:
        return None
    if len(codings) > 1 or codings[0] not in ("gzip", "x-gzip"):
        raise unknown_encoding(", ".join(codings))
    return Gunzip()


class Gunzip:
    """Inflates one member of gzip, piece by piece, so that the reader may stop at any."""

    def __init__(self) -> None:
        self._inflater = zlib.decompressobj(_GZIP_FORMAT)

    def push(self, data: bytes) -> Iterator[bytes]:
        """Yield what the data brings, in pieces of SLICE bytes at most. Raises ApiError."""
        while True:
            try:
                piece = self._inflater.decompress(data, SLICE)
            except zlib.error as error:
                raise invalid(f"The body is not gzip: {error}.") from None
            if self._inflater.unused_data:
                raise invalid("The body goes on behind the end of its gzip data.")
            yield piece
            data = self._inflater.unconsumed_tail
            if not data and len(piece) < SLICE:  # nothing is left inside either
                return

    def check_end(self) -> None:
        if not self._inflater.eof:
            raise invalid("The body ends before its gzip data do.")
