"""ResumableRequest: a request that survives the loss of the replicas that answer it.

Each try at one replica is an Attempt, an engine's request of its own. When an attempt is lost, the
next ones carry the tokens so far as if they had been part of the prompt; the sampler's noise
depends on (seed + choice index, position) alone, so the answer goes on as if nothing had happened.
The reader sees one request: the original ids and indexes, every token once.

Pure bookkeeping: no clock, no transport, no decision about where to go.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from msgspec import structs

from deployments.fleet.protocol import Submit
from deployments.fleet.replica_stream import ReplicaStream
from engine.messages import (
    GenerateRequest,
    Item,
    RequestError,
    RequestMetrics,
    RequestOutput,
    TokenItem,
)


@dataclass(eq=False, slots=True)
class Attempt:
    """One try of a resumable request. Its choice 0 is the original's choice `first_index`.

    `replica` is the stream to the replica that has accepted it. What comes before the receipt is
    kept in `early`, with the stream that it came by.
    """

    origin: "ResumableRequest"
    submit: Submit
    first_index: int
    num_open: int  # choices that have not finished
    num_losses: int = 0  # of the tries before this one
    num_fruitless: int = 0  # the last ones of them in a row that brought no token
    has_tokens: bool = False  # it has brought some
    avoid: tuple[str, ...] = ()
    target: str = ""  # the only replica that it is for
    is_original: bool = False  # submitted as it was planned, under its own id
    replica: ReplicaStream | None = None
    early: list[tuple[ReplicaStream, Item]] = field(
        default_factory=list[tuple[ReplicaStream, Item]]
    )
    missing_since_s: float | None = None

    @property
    def id(self) -> str:
        return self.submit.request.request_id

    def losses(self, blames: bool) -> tuple[int, int]:
        """Count what is lost with this try: all losses, and those in a row without a token.

        `blames`: whether the request may have been the cause of this one.
        """
        num_fruitless = 0 if self.has_tokens else self.num_fruitless + blames
        return self.num_losses + blames, num_fruitless

    @property
    def indexes(self) -> range:
        """Indexes that its choices have in the original request."""
        return range(self.first_index, self.first_index + self.submit.request.n)


class ResumableRequest:
    """Owns what has been delivered. A choice that has ended gets nothing more."""

    __slots__ = (
        "_deliver",
        "_is_open",
        "_num_cached",
        "_num_renamed",
        "_submit",
        "_token_ids",
        "attempts",
        "deadline_s",
    )

    def __init__(self, submit: Submit, deliver: Callable[[Item], None], now_s: float = 0.0) -> None:
        self.attempts: dict[str, Attempt] = {}
        self._submit = submit
        self._deliver = deliver
        self._token_ids: list[list[int]] = [[] for _ in range(submit.request.n)]
        self._is_open = [True] * submit.request.n
        self._num_renamed = 0
        self._num_cached: int | None = None  # of the prompt, at the first replica that answered
        timeout_s = submit.timeout_s
        self.deadline_s = None if timeout_s is None else now_s + timeout_s  # of its first token

    @property
    def has_begun(self) -> bool:
        """Whether any token has been delivered."""
        return any(self._token_ids)

    def first_attempt(self) -> Attempt:
        return self._add(Attempt(self, self._submit, 0, self._submit.request.n, is_original=True))

    def take_tokens(self, attempt: Attempt, item: TokenItem) -> None:
        """Pass on tokens that an attempt brings."""
        _, index, token_ids = item
        index += attempt.first_index
        if self._is_open[index]:
            attempt.has_tokens = True
            self._token_ids[index].extend(token_ids)
            self._deliver(item if attempt.is_original else (self._id, index, token_ids))

    def take_output(self, attempt: Attempt, output: RequestOutput) -> None:
        """Pass on an output that an attempt brings."""
        index = attempt.first_index + output.index
        if not self._is_open[index]:
            return
        attempt.has_tokens |= bool(output.token_ids)
        self._token_ids[index].extend(output.token_ids)
        if output.finish_reason is not None:
            self._is_open[index] = False
            attempt.num_open -= 1
            if attempt.num_open == 0:
                self.attempts.pop(attempt.id, None)
        metrics = self._booked(output.metrics)
        known = structs.replace(output, request_id=self._id, index=index, metrics=metrics)
        self._deliver(known)

    def _booked(self, metrics: RequestMetrics | None) -> RequestMetrics | None:
        """Keep what was cached at first: a later replica may have cached more, and tokens too."""
        if metrics is None:
            return None
        if self._num_cached is None:
            self._num_cached = metrics.num_cached_tokens
        return replace(metrics, num_cached_tokens=self._num_cached)

    def end(self, index: int) -> tuple[Attempt, int | None] | None:
        """End a choice that its reader has ended. Returns what to abort, if it has not finished:
        the attempt, and its choice unless that was the last one."""
        if not self._is_open[index]:
            return None
        attempt = next(a for a in self.attempts.values() if index in a.indexes)
        self._is_open[index] = False
        attempt.num_open -= 1
        if attempt.num_open:
            return attempt, index - attempt.first_index
        del self.attempts[attempt.id]
        return attempt, None

    def fail(self, attempt: Attempt, error: RequestError) -> None:
        """End every choice that the attempt was to finish."""
        for index in range(attempt.submit.request.n):
            self.take_output(
                attempt, RequestOutput(attempt.id, index, [], finish_reason="error", error=error)
            )

    def next_attempts(self, lost: Attempt, blames: bool, avoid: tuple[str, ...]) -> list[Attempt]:
        """Replace a lost attempt: by one like it if nothing has been delivered, else by one for
        each unfinished choice. `blames`: as for `Attempt.losses`."""
        self.attempts.pop(lost.id, None)
        request = lost.submit.request
        if request.n > 1 and not self.has_begun:
            return [self._again(lost, request, lost.first_index, blames, avoid)]
        return [
            self._again(lost, self._rest(index), index, blames, avoid)
            for index in range(lost.first_index, lost.first_index + request.n)
            if self._is_open[index]
        ]

    def submit_at(self, attempt: Attempt, now_s: float) -> Submit:
        """Return what is offered now: the time for the first token goes on from try to try."""
        if self.has_begun:
            return replace(attempt.submit, timeout_s=None)
        if self.deadline_s is None:
            return attempt.submit
        return replace(attempt.submit, timeout_s=max(0.0, self.deadline_s - now_s))

    def rename(self, attempt: Attempt) -> None:
        """Give the attempt a new id, because a replica may have accepted it under the old one."""
        self.attempts.pop(attempt.id, None)
        attempt.submit = self._renamed(attempt.submit.request)
        attempt.is_original = False
        attempt.early.clear()
        self._add(attempt)

    @property
    def _id(self) -> str:
        return self._submit.request.request_id

    def _rest(self, index: int) -> GenerateRequest:
        """Cut one choice from its next token on. `max_tokens` stays the total."""
        original, token_ids = self._submit.request, self._token_ids[index]
        sampling = replace(original.sampling, seed=_as_seed(original.sampling.seed + index))
        if self.has_begun:  # the prompt's logprobs came with the very first token
            sampling = replace(sampling, prompt_logprobs=None)
        return replace(original, sampling=sampling, n=1, output_token_ids=list(token_ids))

    def _again(
        self,
        lost: Attempt,
        request: GenerateRequest,
        first_index: int,
        blames: bool,
        avoid: tuple[str, ...],
    ) -> Attempt:
        num_losses, num_fruitless = lost.losses(blames)
        again = Attempt(
            self,
            self._renamed(request),
            first_index,
            request.n,
            num_losses=num_losses,
            num_fruitless=num_fruitless,
            avoid=avoid,
        )
        return self._add(again)

    def _renamed(self, request: GenerateRequest) -> Submit:
        self._num_renamed += 1
        request = replace(request, request_id=f"{self._id}~{self._num_renamed}")
        return replace(self._submit, request=request)

    def _add(self, attempt: Attempt) -> Attempt:
        self.attempts[attempt.id] = attempt
        return attempt


def _as_seed(number: int) -> int:
    """Wrap modulo 2**64, as the sampler counts; seeds are written as signed."""
    return (number + 2**63) % 2**64 - 2**63
