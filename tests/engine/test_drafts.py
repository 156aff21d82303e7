"""Tests what is drafted, and how much of it, against brute force."""

import random

import pytest

from engine.scheduler.acceptance import MAX_ADAPTERS, Acceptance, AdapterAcceptance
from engine.scheduler.prompt_lookup import MAX_MATCH, MAX_PLACES, PromptLookup
from engine.scheduler.request import Request, SamplingParams
from engine.scheduler.speculation import Draft, NgramDrafter
from engine.scheduler.step_time import StepTime
from tests.engine.support.drafters import FixedCost, Seer, eager


def brute_force(tokens: list[int], most: int) -> tuple[list[int], int]:
    """Compare the newest places of the last pair, and go on as the best one did."""
    end = len(tokens) - 1
    places = [p for p in range(end - 1, 0, -1) if tokens[p - 1 : p + 1] == tokens[-2:]]
    best, longest = -1, 0
    for place in places[:MAX_PLACES]:
        length = 0
        while length < min(MAX_MATCH, place + 1) and tokens[place - length] == tokens[end - length]:
            length += 1
        if length > longest:
            best, longest = place, length
    if not longest:
        return [], 0
    going_on = list(tokens)
    for i in range(most):
        going_on.append(going_on[best + 1 + i])
    return going_on[len(tokens) :], longest


@pytest.mark.parametrize("num_kinds", [1, 2, 5, 60])
def test_a_look_up_finds_the_longest_of_the_newest_places(num_kinds: int) -> None:
    dice, lookup, tokens = random.Random(num_kinds), PromptLookup(), list[int]()
    for _ in range(120):
        new = [dice.randrange(num_kinds) for _ in range(dice.randint(0, 3))]
        if len(tokens) > 9 and dice.random() < 0.3:
            start = dice.randrange(len(tokens) - 5)
            new = tokens[start : start + 5]
        tokens += new
        lookup.extend(new)
        assert len(lookup) == len(tokens)
        most = dice.randint(0, 9)
        expected = brute_force(tokens, most) if most else ([], 0)
        assert lookup.find(most) == expected


def request_of(prompt: list[int], **changes: object) -> Request:
    return Request("r", prompt, SamplingParams(max_tokens=50, **changes), 0.0)  # type: ignore[arg-type]


def test_a_long_prompt_is_indexed_over_several_steps() -> None:
    request, drafter = request_of([*range(1500), *range(1500)]), NgramDrafter()
    assert drafter.draft([(request, 4)]) == [Draft([], 0)]
    assert drafter.draft([(request, 4)]) == [Draft([0, 1, 2, 3], MAX_MATCH)]


def test_drafts_leave_room_for_the_token_that_the_step_brings() -> None:
    def most(request: Request, max_model_len: int = 1000) -> int:
        speculation = eager(Seer(lambda _: [1] * 99, 10**6), 8, max_model_len)
        return sum(len(d.token_ids) for _, d in speculation.propose([request], 100, StepTime()))

    assert most(request_of([1, 2, 3])) == 8
    assert most(request_of([1, 2, 3]), max_model_len=7) == 3
    ending = request_of([1, 2, 3])
    ending.output_token_ids = [1] * 49
    assert most(ending) == 0
    ending.output_token_ids = [1] * 46
    assert most(ending) == 3


def play(chance: float, row: float, num_tokens: int = 4000, num_requests: int = 1) -> float:
    """Return tokens per cost with drafts, each token of which is right with this chance, over those
    without. A row costs `row` of what a step costs without any."""
    dice = random.Random(1)
    speculation = FixedCost(Seer(lambda _: [1] * 16, 10**9), 16, 10**9)
    speculation.cost = row / (1 + row * num_requests)
    requests = [request_of([1, 2, 3]) for _ in range(num_requests)]
    for request in requests:
        request.sampling = SamplingParams(max_tokens=10**9)
    cost, brought = 0.0, 0
    while brought < num_tokens:
        drafts = speculation.propose(requests, 100, StepTime())
        cost += 1 + speculation.cost * sum(len(d.token_ids) for _, d in drafts)
        brought += num_requests
        for request, draft in drafts:
            count = len(draft.token_ids)
            right = next((i for i in range(count) if dice.random() > chance), count)
            assert request.acceptance is not None
            request.acceptance.record(draft.match, count, right)
            brought += right
    return brought / cost / num_requests


@pytest.mark.parametrize(
    ("chance", "row", "num_requests", "least"),
    [
        (0.0, 0.1, 1, 0.97),
        (0.05, 0.1, 1, 0.97),
        (0.2, 0.5, 1, 0.97),
        (0.0, 0.1, 8, 0.97),
        (0.3, 0.3, 8, 0.97),
        (0.95, 0.1, 1, 3.0),
        (0.95, 0.1, 8, 1.3),
        (0.7, 0.1, 1, 1.5),
    ],
)
def test_drafts_gain_where_they_are_right_and_cost_little_where_not(
    chance: float, row: float, num_requests: int, least: float
) -> None:
    assert play(chance, row, num_requests=num_requests) >= least


def test_what_has_lost_is_tried_again() -> None:
    acceptance = Acceptance()
    [first] = acceptance.chances(4, 1)
    for _ in range(20):
        acceptance.record(4, 1, 0)
    [low] = acceptance.chances(4, 1)
    for _ in range(1500):
        acceptance.decline(4)
    assert low < 0.15 * first < 0.8 * first < acceptance.chances(4, 1)[0]


def test_a_request_begins_with_what_its_adapter_has_shown() -> None:
    """What it shows itself soon counts for more."""
    adapters = AdapterAcceptance()
    first = Acceptance().chance(4)
    for _ in range(60):
        adapters.begin("copies").record(4, 1, 1)
        adapters.begin("invents").record(4, 1, 0)
    copying, inventing, other = (adapters.begin(d) for d in ("copies", "invents", ""))
    assert copying.chance(4) > 0.95 and inventing.chance(4) < 0.05
    assert other.chance(4) == first and copying.chance(17) == Acceptance().chance(17)
    for _ in range(4):
        copying.record(4, 1, 0)
    assert copying.chance(4) < 0.4 < 0.9 < adapters.begin("copies").chance(4)


def test_what_an_adapter_has_shown_is_tried_again_and_kept_for_a_bounded_number() -> None:
    adapters = AdapterAcceptance()
    for _ in range(100):
        adapters.begin("").record(4, 1, 0)
    low = adapters.begin("").chance(4)
    request = adapters.begin("")
    for _ in range(20_000):
        request.decline(4)
    assert low < 0.02 < 0.4 < adapters.begin("").chance(4)
    for number in range(MAX_ADAPTERS):
        adapters.begin(f"{number}").record(4, 1, 1)
    assert adapters.begin("").chance(4) == Acceptance().chance(4)
