"""Versions share sessions by weight, each session keeps its version, and a rise only gains some."""

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.policy.traffic_split import choose

SESSIONS = [f"session-{number}" for number in range(1500)]
Weights = dict[int, float]
some_weights = st.dictionaries(st.integers(1, 50), st.floats(0.01, 100), min_size=2, max_size=8)


def chosen(weights: Weights, session: str) -> int:
    return choose([(v, f"t/sql@next {v}", w) for v, w in weights.items()], session)


@settings(max_examples=30, deadline=None)
@given(some_weights)
def test_each_version_answers_its_part_of_the_sessions(weights: Weights) -> None:
    answered = [chosen(weights, session) for session in SESSIONS]
    for version, weight in weights.items():
        part = weight / sum(weights.values())
        spread = math.sqrt(part * (1 - part) * len(SESSIONS))
        assert abs(answered.count(version) - part * len(SESSIONS)) < 5.5 * spread + 1


@settings(max_examples=60, deadline=None)
@given(some_weights, st.data(), st.text(max_size=20))
def test_a_session_moves_only_to_a_version_that_gained(
    before: Weights, data: st.DataObject, session: str
) -> None:
    after = {version: data.draw(st.floats(0.01, 100)) for version in before}
    old, new = chosen(before, session), chosen(after, session)
    assert old == chosen(dict(reversed(before.items())), session), "in any order"
    assert new == old or after[new] / before[new] > after[old] / before[old] * (1 - 1e-9)


@settings(max_examples=50, deadline=None)
@given(some_weights, st.data())
def test_of_a_version_that_goes_only_its_own_sessions_move(
    weights: Weights, data: st.DataObject
) -> None:
    gone = data.draw(st.sampled_from(sorted(weights)))
    zeroed = {version: 0.0 if version == gone else w for version, w in weights.items()}
    left = {version: w for version, w in weights.items() if version != gone}
    for session in SESSIONS[:100]:
        before = chosen(weights, session)
        assert chosen(left, session) == chosen(zeroed, session) != gone
        assert before in (gone, chosen(left, session))


def test_a_rising_share_moves_sessions_one_way() -> None:
    seen: set[str] = set()
    for share in (1, 5, 25, 50, 99):
        moved = {s for s in SESSIONS if chosen({3: 100 - share, 5: share}, s) == 5}
        assert seen <= moved
        seen = moved
    assert chosen({3: 0.0, 5: 1e-9}, "x") == 5
