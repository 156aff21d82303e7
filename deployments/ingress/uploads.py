"""Receive an upload into a folder: multipart/form-data of an adapter's files, or a tar archive.

Bytes are counted, and refused, as they come. Threads split them and write the files.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import PurePosixPath

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.requests import Request as HttpRequest

from adapter_store.archives import FILE_NAMES, check_file_name
from adapter_store.errors import AdapterInvalid
from deployments.ingress.http_errors import ApiError, invalid
from deployments.ingress.upload_folders import Piece, UploadFolder

ARCHIVE = "archive.tar"
TAR_TYPES = ("application/x-tar", "application/tar")
FORM_TYPE = "multipart/form-data"
SILENCE_S = 30.0  # without a byte
GRACE_S = 60.0  # before the rate counts
LEAST_BYTES_PER_S = 32 * 1024
WRITE_BYTES = 2**20  # that are taken at a time
MAX_PARTS = len(FILE_NAMES)


async def receive(
    http_request: HttpRequest,
    folder: UploadFolder,
    max_bytes: int,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Write the body's files into the folder; return the number of bytes that came.

    Raises ApiError, and ClientDisconnect for a client that has gone.
    """
    split = _splitter(http_request)
    _check_announced(http_request, max_bytes)
    num_bytes, begun_s = 0, clock()
    pending = bytearray()

    def take() -> None:
        folder.write(split.push(bytes(pending)))

    async for chunk in _chunks(http_request):
        num_bytes += len(chunk)
        if num_bytes > max_bytes:
            raise upload_too_large(f"{num_bytes} bytes or more", max_bytes)
        if clock() - begun_s > GRACE_S + num_bytes / LEAST_BYTES_PER_S:
            raise upload_too_slow(f"less than {LEAST_BYTES_PER_S} bytes/s came")
        pending += chunk
        if len(pending) >= WRITE_BYTES:
            await asyncio.to_thread(take)
            pending.clear()
    await asyncio.to_thread(take)
    split.check_end()
    await asyncio.to_thread(folder.finish)
    return num_bytes


def media_type_of(http_request: HttpRequest) -> str:
    """Read the body's Content-Type, without its options."""
    media_type, _ = parse_options_header(http_request.headers.get("content-type"))
    return media_type.decode("latin-1")


async def _chunks(http_request: HttpRequest) -> AsyncIterator[bytes]:
    stream = http_request.stream()
    while True:
        try:
            async with asyncio.timeout(SILENCE_S):
                chunk = await anext(stream, None)
        except TimeoutError:
            raise upload_too_slow(f"no byte came for {SILENCE_S:.0f} s") from None
        if chunk is None:
            return
        yield chunk


def _check_announced(http_request: HttpRequest, max_bytes: int) -> None:
    announced = http_request.headers.get("content-length", "")
    if announced.isdecimal() and len(announced) < 20 and int(announced) > max_bytes:
        raise upload_too_large(f"{announced} bytes", max_bytes)


def _splitter(http_request: HttpRequest) -> "Form | Archive":
    """Choose how the body becomes files. Raises ApiError."""
    if (coding := http_request.headers.get("content-encoding", "identity")) != "identity":
        raise ApiError(415, f"An upload has no Content-Encoding, not {coding[:80]!r}.")
    _, options = parse_options_header(http_request.headers.get("content-type"))
    kind = media_type_of(http_request)
    if kind in TAR_TYPES:
        return Archive()
    if kind != FORM_TYPE:
        raise ApiError(
            415,
            f"The Content-Type of an upload is {FORM_TYPE} or {TAR_TYPES[0]}, and application/json "
            f"names a source; not {kind[:80]!r}.",
            code="unsupported_media_type",
        )
    boundary = options.get(b"boundary")
    if not boundary:
        raise invalid(f"The Content-Type {FORM_TYPE} has no boundary.")
    return Form(boundary)


class Archive:
    """A body that is one tar archive."""

    def push(self, chunk: bytes) -> list[Piece]:
        return [(ARCHIVE, chunk)]

    def check_end(self) -> None:
        """Return: what is missing shows when the archive is read."""


class Form:
    """Splits multipart/form-data into files, which are known by their file names.

    A part whose file name ends in .tar is an archive; it must be the only one.
    """

    def __init__(self, boundary: bytes) -> None:
        self._pieces: list[Piece] = []
        self._names: list[str] = []
        self._field, self._value = b"", b""
        self._disposition = b""
        self._has_ended = False
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_header_field": self._on_field,
                    "on_header_value": self._on_value,
                    "on_header_end": self._on_header_end,
                    "on_headers_finished": self._on_part,
                    "on_part_data": self._on_data,
                    "on_end": self._on_end,
                },
            )
        except FormParserError as error:
            raise invalid(f"The boundary of the form is wrong: {error}.") from None

    def push(self, chunk: bytes) -> list[Piece]:
        """Return what a piece of the body brings. Raises ApiError."""
        self._pieces = []
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise invalid(f"The form cannot be read: {str(error)[:200]}.") from None
        except AdapterInvalid as error:
            raise invalid(f"{error}.", "file") from None
        return self._pieces

    def check_end(self) -> None:
        """Raise ApiError unless the last part is whole."""
        if not self._has_ended:
            raise invalid("The form ends before its last part does.")

    def _on_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _on_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header_end(self) -> None:
        if self._field.lower() == b"content-disposition":
            self._disposition = self._value
        self._field, self._value = b"", b""

    def _on_part(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._disposition = b""
        field = options.get(b"name", b"").decode("utf-8", "replace")
        if b"filename" not in options:
            raise invalid(
                f"The field {field[:80]!r} is not known: a form holds files alone.", field[:80]
            )
        self._begin(options[b"filename"].decode("utf-8", "replace"))

    def _begin(self, file_name: str) -> None:
        is_archive = PurePosixPath(file_name).suffix == ".tar"
        name = ARCHIVE if is_archive else check_file_name(file_name)
        if name in self._names:
            raise invalid(f"The form has {name} twice.", "file")
        if ARCHIVE in (name, *self._names) and self._names:
            raise invalid("A form holds files or one archive, not both.", "file")
        self._names.append(name)
        self._pieces.append((name, b""))  # a file without a byte is one, too

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        self._pieces.append((self._names[-1], data[start:end]))

    def _on_end(self) -> None:
        self._has_ended = True


def upload_too_large(what: str, max_bytes: int) -> ApiError:
    return ApiError(
        413,
        f"The upload has {what}, above the limit of {max_bytes} (max_upload_bytes).",
        code="request_too_large",
    )


def upload_too_slow(how: str) -> ApiError:
    return ApiError(408, f"The upload is too slow: {how}.")
