"""Tests messages as bytes: every type is restored exactly, and other bytes are refused."""

import math
import sys
from contextlib import suppress
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import framing
from engine.framing import BadFrame, FrameDecoder, encode
from engine.messages import (
    AddRequest,
    ErrorKind,
    FromEngine,
    GenerateRequest,
    Ping,
    RequestError,
    RequestOutput,
    StartFailed,
    StepOutputs,
    ToEngine,
    TokenLogprobs,
    encodable,
)
from engine.scheduler.request import SamplingParams
from tests.engine.support.message_values import values

TO_ENGINE = msgspec.msgpack.Decoder(ToEngine)
FROM_ENGINE = msgspec.msgpack.Decoder(FromEngine)


def feed(data: bytes, decoder: Any = TO_ENGINE) -> list[Any]:
    return FrameDecoder(decoder).feed(data)


def framed(body: bytes) -> bytes:
    return len(body).to_bytes(4, "little") + body


@given(values(ToEngine))
def test_what_a_process_is_sent_comes_back_as_it_was(message: Any) -> None:
    assert feed(encode(message)) == [message]


@given(values(FromEngine))
def test_what_a_process_sends_comes_back_as_it_was(message: Any) -> None:
    assert feed(encode(message), FROM_ENGINE) == [message]


@given(st.lists(values(ToEngine), max_size=4), st.integers(1, 40))
def test_messages_come_whole_and_in_order_in_any_portions(messages: list[Any], size: int) -> None:
    stream = b"".join(map(encode, messages))
    decoder = FrameDecoder(TO_ENGINE)
    found = [m for i in range(0, len(stream), size) for m in decoder.feed(stream[i : i + size])]
    assert found == messages


@given(values(ToEngine), st.data())
def test_a_truncated_message_is_no_message(message: Any, data: st.DataObject) -> None:
    frame = encode(message)
    assert feed(frame[: data.draw(st.integers(0, len(frame) - 1))]) == []


@given(st.binary(max_size=200))
def test_garbage_in_a_frame_is_refused_and_raises_nothing_else(body: bytes) -> None:
    with pytest.raises(BadFrame):
        feed(framed(body))


@given(values(FromEngine), st.data())
def test_a_damaged_message_is_refused_or_another_one(message: Any, data: st.DataObject) -> None:
    frame = bytearray(encode(message))
    frame[data.draw(st.integers(4, len(frame) - 1))] ^= data.draw(st.integers(1, 255))
    with suppress(BadFrame):
        feed(bytes(frame), FROM_ENGINE)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        encode(Ping())[4:] + b"x",
        msgspec.msgpack.encode(["AbortRequest", 7]),
        msgspec.msgpack.encode(["AbortRequest"]),
        msgspec.msgpack.encode(["Unknown", "a"]),
        b"\x92\xacAbortRequest\xa1\xff",
        b"\x92\xaaAddRequest\x81\xa7unknown" + b"\x91" * 100_000 + b"\xc0",
        b"\xdd\xff\xff\xff\xff",
    ],
    ids=["empty", "more", "type", "short", "unknown", "utf-8", "deep", "huge array"],
)
def test_what_is_wrong_is_named(body: bytes) -> None:
    with pytest.raises(BadFrame, match=rf"a message of {len(body)} bytes cannot be decoded: \w+"):
        feed(framed(body))


def test_a_field_out_of_range_is_refused_with_its_own_reason() -> None:
    good = encode(AddRequest(GenerateRequest("a", [1], SamplingParams(temperature=1.0))))
    bad = good.replace(b"temperature\xcb\x3f\xf0", b"temperature\xcb\xbf\xf0")
    with pytest.raises(BadFrame, match=r"temperature must be in \[0\.0, 100\.0\], not -1\.0"):
        feed(bad)


def test_a_length_over_the_bound_is_refused_before_anything_is_read() -> None:
    decoder = FrameDecoder(TO_ENGINE)
    with pytest.raises(BadFrame, match=r"of 1073741825 bytes is longer than 1073741824"):
        decoder.feed((framing.MAX_BODY_BYTES + 1).to_bytes(4, "little"))
    assert FrameDecoder(TO_ENGINE).feed(framing.MAX_BODY_BYTES.to_bytes(4, "little")) == []


def test_a_message_over_the_bound_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(framing, "MAX_BODY_BYTES", 100)
    with pytest.raises(BadFrame, match="longer than 100"):
        encode(StartFailed("x" * 100))


# ---- values at the edges ---------------------------------------------------------------------


@pytest.mark.parametrize("seed", [-(2**63), -1, 0, 2**63 - 1])
def test_seeds_keep_all_their_bits(seed: int) -> None:
    message = AddRequest(GenerateRequest("a", [2**31 - 1], SamplingParams(seed=seed)))
    assert feed(encode(message)) == [message]


def test_log_probabilities_may_be_infinite_or_not_a_number() -> None:
    entry = TokenLogprobs(-math.inf, ((1, math.inf), (2, math.nan), (3, sys.float_info.min)))
    sent = StepOutputs([RequestOutput("a", 0, [1], logprobs=[entry])])
    (found,) = feed(encode(sent), FROM_ENGINE)
    assert repr(found) == repr(sent)


def test_plain_tokens_stay_a_tuple() -> None:
    (found,) = feed(encode(StepOutputs([("a", 0, [1, 2])])), FROM_ENGINE)
    assert found.items == [("a", 0, [1, 2])] and type(found.items[0]) is tuple


def test_a_lone_surrogate_in_an_error_is_escaped() -> None:
    error = RequestError(ErrorKind.ADAPTER_INVALID, "tensor \ud800 \u00e9")
    assert error.message == encodable("tensor \ud800 \u00e9") == "tensor \\ud800 \u00e9"
    sent = StepOutputs([RequestOutput("a", 0, [], finish_reason="error", error=error)])
    assert feed(encode(sent), FROM_ENGINE) == [sent]
