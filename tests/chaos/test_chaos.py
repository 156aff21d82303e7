"""The programs of this folder: short runs, so that they keep working, and what they are made of."""

from collections import Counter

import pytest

from tests.chaos import deaths, fuzz, storm
from tests.chaos.case import Case
from tests.chaos.exchange import Answer, problem
from tests.chaos.fuzz import grammar


def test_a_case_is_the_same_each_time_and_unlike_its_neighbours() -> None:
    cases = [grammar(True).case(7, number) for number in range(100)]
    assert cases == [grammar(True).case(7, number) for number in range(100)]
    assert len({case.raw() for case in cases}) > 95
    assert grammar(True).case(8, 0) != cases[0]


def test_the_cases_hold_every_kind_of_change() -> None:
    made = grammar(False)
    found = Counter(c for number in range(1000) for c in made.case(0, number).changes)
    assert len(found) > 25 and min(found.values()) > 1


CASE = Case(0, "POST", b"/v1/completions", (), b"")
ERROR = b'{"error": {"message": "no", "type": "t", "param": null, "code": null}}'
FAULT = b'{"error": {"message": "no", "type": "server_error", "param": null, "code": null}}'
SSE = "text/event-stream; charset=utf-8"
# Of messages, of responses, and of LoRAX
THEIR_FAULT = b'{"type": "error", "error": {"type": "api_error", "message": "no"}}'
FAILED = (
    b'event: error\ndata: {"type": "error", "code": "internal_error", "message": "no"}\n\n'
    b'event: response.failed\ndata: {"type": "response.failed"}\n\n'
)
STOPPED = b'event: message_stop\ndata: {"type": "message_stop"}\n\n'
LAST_TOKEN = b'data:{"token": {}, "generated_text": "x"}\n\n'
LORAX_FAULT = b'data:{"error": "no", "error_type": "incomplete_generation"}\n\n'


@pytest.mark.parametrize(
    ("answer", "word"),
    [
        (Answer(200, b"{}", "application/json"), None),
        (Answer(400, ERROR, "application/json"), None),
        (Answer(400, b"Bad Request", "text/plain"), "not JSON"),
        (Answer(400, b'{"detail": "no"}', "application/json"), "not JSON"),
        (Answer(503, FAULT, "application/json"), "503"),
        (Answer(0, b"closed"), "no answer"),
        (Answer(200, b"{}", "application/json", is_whole=False), "cut"),
        (Answer(200, b"data: {}\n\ndata: [DONE]\n\n", SSE), None),
        (Answer(200, b": keep-alive\n\ndata: {}\n\ndata: [DONE]\n\n", SSE), None),
        (Answer(200, b"data: {}\n\n", SSE), "no end"),
        (Answer(200, b"data: {}\n\ndata: {", SSE), "amid an event"),
        (Answer(200, b"data: {}\n\ndata: " + FAULT + b"\n\n", SSE), "error event"),
        (Answer(400, THEIR_FAULT, "application/json"), None),
        (Answer(200, b"event: ping\ndata: {}\n\n" + STOPPED, SSE), None),
        (Answer(200, b"event: ping\ndata: {}\n\n", SSE), "no end"),
        (Answer(200, b"event: error\ndata: " + THEIR_FAULT + b"\n\n", SSE), "error event"),
        (Answer(200, FAILED, SSE), "error event"),
        (Answer(200, LAST_TOKEN, SSE), None),
        (Answer(200, b'data:{"generated_text": null}\n\n', SSE), "no end"),
        (Answer(200, LORAX_FAULT, SSE), "error event"),
    ],
)
def test_a_broken_promise_is_found(answer: Answer, word: str | None) -> None:
    found = problem(CASE, answer)
    assert found is None if word is None else found is not None and word in found


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("more", [[], ["--tenants"]])
def test_a_short_fuzz_breaks_no_promise(more: list[str]) -> None:
    assert fuzz.main(["--count", "300", *more]) == 0


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_short_storm_breaks_no_promise() -> None:
    assert storm.main(["--minutes", "1", "--streams", "8"]) == 0


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_few_deaths_change_no_token() -> None:
    assert deaths.main(["--deaths", "5", "--streams", "6", "--kinds", "18"]) == 0
