"""Makes records of the slots of a journal."""

from msgspec import structs

from deployments.usage.journal import Slot
from deployments.usage.record import UsageRecord, decode_json

KILLED = "killed"  # the finish reason of a request whose ingress died
KILLED_STATUS = 500
# What an answer's choices may end with, one bit each.
REASONS = ("stop", "length", "tool_calls", "abort", "error")


def reason_bits(reasons: set[str]) -> int:
    """Encode finish reasons; one that is not known raises ValueError."""
    return sum(1 << REASONS.index(reason) for reason in reasons)


def reason_text(bits: int) -> str:
    return ",".join(reason for at, reason in enumerate(REASONS) if bits >> at & 1)


def record_of(slot: Slot) -> UsageRecord:
    """Complete what was known at the beginning. Raises msgspec.DecodeError."""
    begun = decode_json(slot.text)
    assert isinstance(begun, UsageRecord), "a slot begins with a request"
    prompt, cached, load_bytes, queue_s, ttft_s = slot.read
    e2e_s, status, bits = slot.end
    return structs.replace(
        begun,
        prompt_tokens=prompt,
        cached_tokens=cached,
        load_bytes=load_bytes,
        queue_s=round(queue_s, 6),
        ttft_s=None if ttft_s < 0 else round(ttft_s, 6),
        output_tokens=slot.sent[0],
        reasoning_tokens=slot.sent[1],
        e2e_s=round(e2e_s, 6),
        finish_reason=KILLED if slot.is_live else reason_text(bits),
        status=KILLED_STATUS if slot.is_live else status,
    )
