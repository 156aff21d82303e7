"""Speculation: drafts tokens that may come next, for the step to verify beside the next one.

A step that computes a request's newest token can compute guesses behind it in the same pass, and
samples a token at each of these rows as if the guesses before it were the output. As a sample
depends on its position and what is before it alone, the guesses that the samples repeat are exactly
the tokens that steps of one token would have given; the rest is dropped.

How many guesses are worth their rows is decided for all requests of a step together: a row is worth
its cost if the chance that it brings a token is above its price, which is what the step's time for
one row would bring otherwise. So drafts end by themselves where they lose.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from engine.scheduler.acceptance import Acceptance, AdapterAcceptance
from engine.scheduler.prompt_lookup import PromptLookup
from engine.scheduler.request import Request
from engine.scheduler.step_budget import decode_shape
from engine.scheduler.step_time import StepShape, StepTime

MAX_INDEXED_TOKENS = 2048  # that one step adds to the indexes of all requests together
LEAST_PRICE = 0.05  # a row costs more on any machine; steps that others disturb may say less
ROUNDS = 3  # of lengths and price; each round's price is at least the one before


class Draft(NamedTuple):
    """Tokens that may come next, and how long the match behind which they were found is."""

    token_ids: list[int]
    match: int


class Drafter(Protocol):
    """Guesses tokens. Called once in each step, for requests whose tokens are all known."""

    def draft(self, wishes: Sequence[tuple[Request, int]]) -> list[Draft]:
        """Return a draft of at most so many tokens for each request, perhaps empty."""
        ...

    @property
    def step_s(self) -> float:
        """Seconds that guessing a token more for each request takes; 0 if that is no matter."""
        ...


class NgramDrafter:
    """Drafts from a request's own prompt and output."""

    step_s = 0.0

    def draft(self, wishes: Sequence[tuple[Request, int]]) -> list[Draft]:
        left, drafts = MAX_INDEXED_TOKENS, list[Draft]()
        for request, most in wishes:
            lookup = request.lookup = request.lookup or PromptLookup()
            start = len(lookup)
            end = min(request.num_tokens, start + left)
            lookup.extend(request.token_ids(start, end))
            left -= end - start
            is_complete = end == request.num_tokens
            drafts.append(Draft(*lookup.find(most)) if is_complete else Draft([], 0))
        return drafts


@dataclass(slots=True)
class _Offer:
    """A request's draft; `chances` are negative, so that they ascend."""

    request: Request
    draft: Draft
    acceptance: Acceptance
    chances: list[float]
    count: int = 0  # how much of it is taken

    def take(self, price: float) -> float:
        """Choose the number of tokens; return how many of them are expected to be right."""
        self.count = bisect_right(self.chances, -price)
        return -sum(self.chances[: self.count])


@dataclass(slots=True)
class Speculation:
    """Chooses the drafts of each step."""

    drafter: Drafter
    max_draft_tokens: int
    max_model_len: int
    _adapters: AdapterAcceptance = field(default_factory=AdapterAcceptance)

    def propose(
        self, requests: Sequence[Request], budget: int, times: StepTime
    ) -> list[tuple[Request, Draft]]:
        """Draft for requests that decode in this step, at most `budget` tokens in all."""
        if not requests or budget <= 0:
            return []
        row = self.row_cost(requests, times)
        least = row * len(requests)
        wishes = self.wishes(requests, times, least)
        offers = self._offers(wishes, least) if wishes else []
        self._choose(offers, len(requests), row)
        chosen: list[tuple[Request, Draft]] = []
        for offer in offers:
            count = min(offer.count, budget)
            if count:
                budget -= count
                chosen.append((offer.request, Draft(offer.draft.token_ids[:count], offer.draft[1])))
        return chosen

    def row_cost(self, requests: Sequence[Request], times: StepTime) -> float:
        """Return what a row more costs, as a part of a step with one row of each request."""
        step_s = times.predict(decode_shape((request, 1) for request in requests))
        part = times.seconds_added(StepShape(1, 1)) / max(step_s, 1e-9)
        return max(part, LEAST_PRICE / len(requests))

    def wishes(
        self, requests: Sequence[Request], times: StepTime, least: float
    ) -> list[tuple[Request, int]]:
        """List requests, each with how many tokens may be guessed; a guess whose chance is below
        `least` is of no use."""
        return [(r, most) for r in requests if (most := self.most(r)) > 0]

    def acceptance(self, request: Request) -> Acceptance:
        """Return a request's acceptance, which begins with its first draft."""
        if request.acceptance is None:
            request.acceptance = self._adapters.begin(request.adapter_digest)
        return request.acceptance

    def most(self, request: Request) -> int:
        """The step brings a token by itself; drafts may bring all further ones."""
        left = request.sampling.max_tokens - len(request.output_token_ids)
        room = self.max_model_len - request.num_tokens
        return min(self.max_draft_tokens, left - 1, room - 1)

    def _offers(self, wishes: list[tuple[Request, int]], least: float) -> list[_Offer]:
        """Draft for requests; drop what is below the least price, as nearly all of free text is."""
        offers: list[_Offer] = []
        drafts = self.drafter.draft(wishes)
        for (request, _), draft in zip(wishes, drafts, strict=True):
            if not draft.token_ids:
                continue
            acceptance = self.acceptance(request)
            if acceptance.chance(draft.match) < least:
                acceptance.decline(draft.match)
            else:
                offers.append(_offer(request, draft, acceptance))
        return offers

    def _choose(self, offers: list[_Offer], num_requests: int, row: float) -> None:
        """Choose all lengths such that tokens per second are the most (Dinkelbach 1967).

        The price of a row is what its time brings in this step otherwise, in tokens.
        """
        if not offers:
            return
        num_drafts, num_tokens = 0, float(num_requests)
        for _ in range(ROUNDS):
            price = row * num_tokens / (1 + row * num_drafts)
            num_tokens = num_requests + sum(offer.take(price) for offer in offers)
            num_drafts = sum(offer.count for offer in offers)
        for offer in offers:
            if not offer.count:
                offer.acceptance.decline(offer.draft.match)


def _offer(request: Request, draft: Draft, acceptance: Acceptance) -> _Offer:
    chances = acceptance.chances(draft.match, len(draft.token_ids))
    return _Offer(request, draft, acceptance, [-chance for chance in chances])
