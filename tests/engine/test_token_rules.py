"""Tests that end tokens and biases are made once per request, as their lists say."""

from hypothesis import given
from hypothesis import strategies as st

from engine.scheduler.limits import SchedulerLimits
from engine.scheduler.request import (
    MAX_LOGIT_BIASES,
    MAX_STOP_TOKEN_IDS,
    FinishReason,
    Request,
    SamplingParams,
)
from engine.scheduler.token_rules import token_rules
from tests.engine.test_scheduler import make_request, make_world

TOKEN_IDS = st.integers(0, 30)
PARAMS = st.builds(
    SamplingParams,
    max_tokens=st.just(50),
    min_tokens=st.integers(0, 20),
    ignore_eos=st.booleans(),
    eos_token_ids=st.none() | st.lists(TOKEN_IDS, max_size=3).map(tuple),
    stop_token_ids=st.lists(TOKEN_IDS, max_size=9).map(tuple),
    logit_bias=st.lists(st.tuples(TOKEN_IDS, st.floats(-100, 100)), max_size=9).map(tuple),
)
LIMITS = SchedulerLimits(8, 16, 64, eos_token_ids=(2, 7))


def stop_reason(sampling: SamplingParams, num_outputs: int, token_id: int) -> FinishReason | None:
    """Find the reason by looking through the lists."""
    own = sampling.eos_token_ids
    eos = LIMITS.eos_token_ids if own is None else own
    ends = [*sampling.stop_token_ids, *([] if sampling.ignore_eos else eos)]
    if num_outputs >= sampling.min_tokens and any(token_id == end for end in ends):
        return FinishReason.STOP
    return FinishReason.LENGTH if num_outputs >= sampling.max_tokens else None


@given(PARAMS, st.integers(1, 50), TOKEN_IDS)
def test_a_request_ends_as_its_lists_say(
    sampling: SamplingParams, num_outputs: int, token_id: int
) -> None:
    output = [0] * (num_outputs - 1) + [token_id]
    request = Request("r", [1], sampling, 0.0, output_token_ids=output)
    request.rules = LIMITS.rules(sampling)
    assert LIMITS.end_of(request, token_id) == stop_reason(sampling, num_outputs, token_id)


@given(PARAMS)
def test_each_token_has_the_last_of_its_biases(sampling: SamplingParams) -> None:
    biases = LIMITS.rules(sampling).biases
    pairs = [] if biases is None else list(zip(*biases, strict=True))
    last = dict(sampling.logit_bias)
    assert [token_id for token_id, _ in pairs] == list(last)
    assert [abs(bias - last[token_id]) < 1e-5 for token_id, bias in pairs] == [True] * len(last)


def test_choices_and_steps_share_what_was_made_once() -> None:
    world = make_world()
    most = tuple(range(1000, 1000 + MAX_STOP_TOKEN_IDS))
    biases = tuple((token_id, 1.0) for token_id in range(MAX_LOGIT_BIASES))
    request = make_request("r", [1, 2], n=4, max_tokens=5, stop=most, min_tokens=4)
    for choice in (request, *request.forks):
        object.__setattr__(choice.sampling, "logit_bias", biases)
    world.scheduler.add(request)
    rules = request.rules
    assert all(fork.rules is rules for fork in request.forks)
    world.step()
    batch = world.launch()
    assert batch is not None
    for row in batch.requests:
        assert row.biases is rules.biases
        assert row.forbidden_token_ids is rules.early


WORDS = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), max_size=6)


@given(WORDS, st.lists(st.integers(0, 3), max_size=8), st.booleans())
def test_the_last_token_of_a_bad_word_is_forbidden_behind_the_others(
    words: list[list[int]], output: list[int], may_end: bool
) -> None:
    rules = token_rules(frozenset({9}), (), words)
    expected = {w[-1] for w in words if len(w) - 1 <= len(output) and _ends_with(output, w[:-1])}
    expected |= set() if may_end else {9}
    assert set(rules.forbidden(may_end, output)) == expected
    assert rules.needs_output == any(len(word) > 1 for word in words)


def _ends_with(output: list[int], start: list[int]) -> bool:
    return not start or output[-len(start) :] == start
