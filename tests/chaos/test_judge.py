"""The judge of a storm finds each kind of wrong answer, and takes no right one for wrong."""

from pathlib import Path

import pytest

from adapter_store.names import AdapterRef
from tests.chaos.judge import CALM, Listened, Span, judge
from tests.chaos.oracle import Prompt
from tests.chaos.publisher import Meaning, Publisher
from tests.chaos.stream import CUT, WHOLE, Heard
from tests.chaos.world import MODEL, Content

PROMPT = Prompt((1, 2, 3), 4, 0)
OLD, NEW = Content("red", 0, Path("old")), Content("red", 1, Path("new"))
ANSWERS = {(None, PROMPT): [9, 9, 9, 9], (OLD, PROMPT): [1, 2, 3, 4], (NEW, PROMPT): [5, 6, 7, 8]}
MOVED_S = 100.0  # when NEW became the latest


class NoStore:
    def publish(self, *args: object) -> AdapterRef:
        raise NotImplementedError


def publisher() -> Publisher:
    made = Publisher(NoStore(), "base", {"red": [OLD, NEW]}, 0)  # type: ignore[arg-type]
    first, second = Meaning(0.0, 1.0, 1, OLD), Meaning(MOVED_S, MOVED_S + 1, 2, NEW)
    made.latest["red"] += [first, second]
    made.aliases["red"] += [first]
    return made


def heard(sent_s: float, token_ids: list[int], end: str = WHOLE) -> Heard:
    return Heard(sent_s, token_ids, [sent_s + 1], end, sent_s + 2)


def problems(model: str, what: Heard, *spans: Span) -> list[str]:
    return judge([Listened(model, PROMPT, what)], spans, publisher(), ANSWERS).problems


@pytest.mark.parametrize(
    ("model", "what"),
    [
        (MODEL, heard(50, [9, 9, 9, 9])),
        ("red", heard(50, [1, 2, 3, 4])),
        ("red", heard(MOVED_S - 1, [5, 6, 7, 8])),  # it moved while the stream began
        ("red", heard(MOVED_S + 4, [1, 2, 3, 4])),  # an ingress may lag a little
        ("red", heard(MOVED_S + 20, [5, 6, 7, 8])),
        ("red@1", heard(MOVED_S + 20, [1, 2, 3, 4])),
        ("red@stable", heard(MOVED_S + 20, [1, 2, 3, 4])),
    ],
)
def test_a_right_answer_is_right(model: str, what: Heard) -> None:
    assert problems(model, what) == []


@pytest.mark.parametrize(
    ("model", "what"),
    [
        (MODEL, heard(50, [1, 2, 3, 4])),  # an adapter's
        ("red", heard(50, [9, 9, 9, 9])),  # the base's
        ("red", heard(50, [5, 6, 7, 8])),  # not published yet
        ("red", heard(MOVED_S + 20, [1, 2, 3, 4])),  # long replaced
        ("red@1", heard(MOVED_S + 20, [5, 6, 7, 8])),
        ("red@stable", heard(MOVED_S + 20, [5, 6, 7, 8])),
        ("red", heard(50, [1, 2, 4])),  # one is lost
        ("red", heard(50, [1, 2, 2, 3, 4])),  # one comes twice
        ("red", heard(50, [1, 2, 3])),  # whole, and yet too short
        ("red", heard(50, [2], CUT)),  # not even the beginning is right
    ],
)
def test_wrong_tokens_are_found(model: str, what: Heard) -> None:
    assert "tokens that none" in problems(model, what)[0]


def test_while_the_store_fails_a_name_keeps_its_last_known_meaning() -> None:
    stale = heard(MOVED_S + 20, [1, 2, 3, 4])
    assert problems("red", stale, Span("store hangs", MOVED_S - 2, MOVED_S + 19)) == []
    assert problems("red", stale, Span("hostile bodies", MOVED_S - 2, MOVED_S + 19)) != []
    assert problems("red", stale, Span("store hangs", MOVED_S - 20, MOVED_S + 5)) != []


@pytest.mark.parametrize(
    ("kind", "what", "is_explained"),
    [
        ("store hangs", heard(50, [], "503 unavailable"), True),
        ("store hangs", heard(50, [], "500 internal_error"), False),
        ("store hangs", heard(50, [], "event unavailable"), True),  # after a comment
        ("store hangs", heard(50, [1, 2], "event unavailable"), False),
        ("engine is killed", heard(50, [], "503 unavailable"), False),
        ("ingress is killed", heard(50, [1, 2], CUT), True),
        ("ingress is killed", heard(50, [], CUT), False),
        ("hostile bodies", heard(50, [], "429 overloaded"), True),
    ],
)
def test_an_error_is_explained_by_the_fault_of_its_time(
    kind: str, what: Heard, is_explained: bool
) -> None:
    assert (problems("red", what, Span(kind, 45, 55)) == []) == is_explained
    assert problems("red", what, Span(kind, 60, 70)) != [], "it came later"
    assert problems("red", what, Span(kind, 30, 40)) != [], "it was long over"


def test_streams_are_counted_by_the_fault_that_they_met() -> None:
    span = Span("store hangs", 45, 55)
    met = Listened("red", PROMPT, heard(50, [], "503 unavailable"))
    calm = Listened("red", PROMPT, heard(80, [1, 2, 3, 4]))
    verdict = judge([met, calm, calm], [span], publisher(), ANSWERS)
    assert verdict.ends == {"store hangs": {"503 unavailable": 1}, CALM: {WHOLE: 2}}
    assert verdict.problems == [] and verdict.num_tokens == 8
