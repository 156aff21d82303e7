"""UsageRecord: what one request used and what it is charged for, and how that is written.

The counts are those that are charged (docs/usage.md says what is right in which case). A line of a
local log has a checksum before its JSON, since a crash may tear the last one; an uploaded object
has JSON alone, because gzip checks itself.
"""

import zlib

import msgspec

CHECKSUM_CHARS = 9  # eight digits and a space


class UsageRecord(
    msgspec.Struct, kw_only=True, omit_defaults=True, tag_field="kind", tag="request"
):
    """`time_s` is the arrival, in seconds since 1970; the other times are seconds from it on.

    `id` is the server's own, `request_id` what the client may have chosen. `adapter` is
    `tenant/name`, and None for the base. `output_tokens` are those that the client was sent, of
    which `reasoning_tokens` are reasoning; `cached_tokens` are a part of `prompt_tokens`.
    `load_bytes` is the size of the adapter if it had to be loaded for this request.
    """

    id: str
    request_id: str
    time_s: float
    tenant: str
    key_id: str = ""
    route: str
    model: str
    adapter: str | None = None
    version: int = 0
    digest: str = ""
    lora_rank: int = 0
    price_class: str = ""
    priority: int = 0
    priority_class: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    load_bytes: int = 0
    queue_s: float = 0.0
    ttft_s: float | None = None
    e2e_s: float = 0.0
    finish_reason: str = ""
    status: int = 0


class LostUsage(msgspec.Struct, kw_only=True, tag_field="kind", tag="lost"):
    """What a writer could not record, all of it so far: the largest of one writer counts."""

    writer: str
    requests: int
    prompt_tokens: int
    output_tokens: int


Line = UsageRecord | LostUsage

_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Line)


def encode_json(line: Line) -> bytes:
    """Encode without a newline."""
    return _encoder.encode(line)


def decode_json(data: bytes) -> Line:
    """Decode one line. Raises msgspec.DecodeError."""
    return _decoder.decode(data)


def checked(data: bytes) -> bytes:
    """Write JSON as a line of a local log."""
    return b"%08x %b\n" % (zlib.crc32(data), data)


def unchecked(line: bytes) -> bytes | None:
    """Return the JSON of a line of a local log without its newline; None if it is damaged."""
    digits, data = line[: CHECKSUM_CHARS - 1], line[CHECKSUM_CHARS:]
    try:
        is_right = int(digits, 16) == zlib.crc32(data) and line[8:9] == b" "
    except ValueError:
        return None
    return data if is_right else None
