"""Request bodies: what is JSON, and that no body takes long to refuse."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.ingress.api.json_body import MAX_NESTED, MAX_STRINGS, decode_json
from deployments.ingress.http_errors import ApiError

SIZE = 8 * 2**20


def refused(body: bytes) -> ApiError:
    with pytest.raises(ApiError) as caught:
        decode_json(body)
    assert caught.value.status == 400 and len(caught.value.message) < 500
    return caught.value


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        (b'{"a": [1, 2.5, null, "x"]}', {"a": [1, 2.5, None, "x"]}),
        (b'\xef\xbb\xbf{"a": 1}', {"a": 1}),
        (b'{"a": "\\ud83d\\ude00"}', {"a": "😀"}),
        (b'{"a": "\\\\ud83d"}', {"a": "\\ud83d"}),
        (b'{"a": 1' + b"0" * 400 + b"}", {"a": 10**400}),
    ],
)
def test_json_is_decoded(body: bytes, wanted: object) -> None:
    assert decode_json(body) == wanted


def test_a_text_may_hold_any_number_of_brackets_and_quotes() -> None:
    body = b'{"a": "' + b"[{:" * MAX_NESTED + b'\\"' * 3 * MAX_STRINGS + b'"}'
    assert decode_json(body) == {"a": "[{:" * MAX_NESTED + '"' * 3 * MAX_STRINGS}


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff", b'{"a": NaN}', b'{"a": 1e999}', b"[" * 9000, b'{"a": "\\u12"}']
)
def test_what_is_no_json_is_refused(body: bytes) -> None:
    assert "not valid JSON" in refused(body).message


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b'{"model": "m", "prompt": "hi \\ud83d"}', "prompt"),
        (b'{"model": "m", "prompt": ["a", "\\ud83d and so on, for long enough"]}', "prompt"),
        (b'{"messages": [{"role": "user", "content": "\\ud83d\\ud83d"}], "n": 1}', "messages"),
        (b'{"a": "\\ude00 of a pair", "b": "\\ud83d"}', "a"),
        (b'{"a": "\\\\\\ud83d", "b": 1}', "a"),
        (b'{"a": "\\ud83d\\u0041", "b": 1}', "a"),
        (b'{"\\ud83d": 1}', None),
    ],
)
def test_half_of_a_surrogate_pair_is_named_with_its_field(body: bytes, field: str | None) -> None:
    error = refused(body)
    assert "surrogate pair" in error.message and error.param == field


@given(st.text(), st.text())
def test_whole_characters_are_never_taken_for_halves(name: str, text: str) -> None:
    for ensure_ascii in (True, False):
        body = json.dumps({name: text}, ensure_ascii=ensure_ascii).encode()
        assert decode_json(body) == {name: text}


def fill(unit: bytes, before: bytes = b'{"a":[', after: bytes = b"0]}") -> bytes:
    return before + unit * (SIZE // len(unit)) + after


LONGEST = [
    fill(b"{},"),
    fill(b"[],"),
    fill(b'"",'),
    fill(b'"[",'),
    fill(b'"a":0,', b"{", b'"b":0}'),
    fill(b'"[', b"", b""),
    fill(b"[", b"", b""),
    fill(b"\\ud83d", b'{"a":"', b'"}'),
    fill(b"\\ud83d\\ude00", b'{"a":"', b'"x}'),
    fill(b"\\\\", b'{"a":"', b'"x}'),
    fill(b"1", b'{"a":', b"}"),
]


@pytest.mark.parametrize("number", range(len(LONGEST)))
def test_the_longest_bodies_are_refused_at_once(number: int) -> None:
    body = LONGEST[number]
    began = time.thread_time()
    refused(body)
    assert time.thread_time() - began < 0.5  # a tenth of that on a quiet machine
