"""The server's own usage records as a trace: those of an uploaded object, a log, or a folder."""

import gzip
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

ENDINGS = (".jsonl.gz", ".jsonl", ".log")
CHECKSUM_CHARS = 9  # before the JSON of a line of a log


class UsedRequest(msgspec.Struct, frozen=True, tag_field="kind", tag="request"):
    """What a simulation needs of a record; the other fields are not looked at."""

    id: str
    time_s: float
    tenant: str
    prompt_tokens: int = 0
    output_tokens: int = 0
    adapter: str | None = None
    version: int = 0


class _Lost(msgspec.Struct, tag_field="kind", tag="lost"):
    """Requests that have no record cannot be simulated."""

    requests: int


_decoder = msgspec.json.Decoder(UsedRequest | _Lost)


def usage_records(path: Path) -> list[UsedRequest]:
    """Read all records by time, each once: they are written as requests end.

    All of them are in memory, at some 300 bytes each. Raises OSError, ValueError.
    """
    paths = [path]
    if path.is_dir():
        paths = sorted(each for each in path.iterdir() if each.name.endswith(ENDINGS))
    found = {record.id: record for each in paths for record in _records(each)}
    return sorted(found.values(), key=lambda record: record.time_s)


def _records(path: Path) -> Iterator[UsedRequest]:
    for number, line in enumerate(_lines(path), 1):
        data = line[CHECKSUM_CHARS:] if line[:1] not in (b"{", b"") else line
        try:
            record = _decoder.decode(data)
        except msgspec.DecodeError as error:
            raise ValueError(f"{path.name}: line {number} is no usage record: {error}") from None
        if isinstance(record, UsedRequest):
            yield record


def _lines(path: Path) -> Iterable[bytes]:
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).splitlines()
