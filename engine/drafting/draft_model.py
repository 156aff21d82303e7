"""DraftModel: guesses tokens with a smaller model, for all requests of a step together.

It has KV blocks of its own. A request's blocks hold the KV of its first tokens and of its last
guesses; once its next tokens are known, the guesses that were right are kept, and the rest is
overwritten. A prompt is computed piece by piece before anything is guessed behind it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from engine.backends.runner import Runner
from engine.scheduler.batch import ScheduledBatch, ScheduledRequest
from engine.scheduler.model_speculation import FIRST_MATCH
from engine.scheduler.request import Request, RequestStatus, SamplingParams
from engine.scheduler.speculation import Draft

GREEDY = SamplingParams(max_tokens=1, temperature=0.0)
NEWEST = 0.1  # weight of the newest step in the time that one takes


@dataclass(slots=True)
class _Known:
    """What the draft model's blocks hold of a request."""

    request: Request
    table: list[int] = field(default_factory=list[int])
    num_tokens: int = 0  # of prompt and output
    guesses: list[int] = field(default_factory=list[int])  # behind them

    def settle(self) -> int:
        """Keep the guesses that were right; return how many tokens are to be computed."""
        request, start = self.request, self.num_tokens
        new = request.token_ids(start, min(request.num_tokens, start + len(self.guesses)))
        for guess, token_id in zip(self.guesses, new, strict=False):
            if guess != token_id:
                break
            self.num_tokens += 1
        self.guesses = []
        self.num_tokens = min(self.num_tokens, request.num_tokens - 1)  # the last one gives logits
        return request.num_tokens - self.num_tokens


@dataclass(slots=True)
class _Row:
    """A request in the guessing of one step; `token_ids` are computed next."""

    known: _Known
    most: int
    token_ids: list[int] = field(default_factory=list[int])
    is_complete: bool = False  # with these, all of the request is computed
    draft: list[int] = field(default_factory=list[int])

    def scheduled(self) -> ScheduledRequest:
        known = self.known
        return ScheduledRequest(
            known.request.request_id,
            known.request.index,
            self.token_ids,
            known.num_tokens + len(known.guesses),
            tuple(known.table),
            0,
            GREEDY,
            self.is_complete,
        )


class DraftModel:
    """A Drafter. Token ids from `vocab_size` on are not known to both models."""

    def __init__(
        self,
        runner: Runner,
        *,
        num_blocks: int,
        block_size: int,
        max_batched_tokens: int,
        max_model_len: int,
        vocab_size: int,
        clock: Callable[[], float],
    ) -> None:
        self._runner = runner
        self._block_size = block_size
        self._max_batched_tokens = max_batched_tokens
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size
        self._clock = clock
        self._free = list(range(num_blocks))[::-1]
        self._known: dict[tuple[str, int], _Known] = {}  # those used last at the end
        self._spent_s = 0.0
        self.step_s = 0.0  # that one token more for each request takes

    def draft(self, wishes: Sequence[tuple[Request, int]]) -> list[Draft]:
        start_s = self._clock()
        self._forget_ended()
        wanted = {request.key for request, _ in wishes}
        rows = [self._row(request, most, wanted) for request, most in wishes]
        self._guess(self._catch_up([row for row in rows if row is not None]))
        self._spent_s += self._clock() - start_s
        return [Draft([] if row is None else row.draft, FIRST_MATCH) for row in rows]

    def take_spent_s(self) -> float:
        """Return the seconds that guessing has taken since the last call."""
        spent_s, self._spent_s = self._spent_s, 0.0
        return spent_s

    # ==== blocks ====

    def _forget_ended(self) -> None:
        for key, known in list(self._known.items()):
            if known.request.status is RequestStatus.FINISHED:
                self._forget(key)

    def _forget(self, key: tuple[str, int]) -> None:
        self._free += self._known.pop(key).table

    def _row(self, request: Request, most: int, wanted: set[tuple[str, int]]) -> _Row | None:
        """Find what is known of a request and make room for guesses; None if there is none.

        Requests without a wish lose their blocks first, those used longest ago.
        """
        most = min(most, self._max_model_len - request.num_tokens)
        if most <= 0:
            return None
        known = self._known.pop(request.key, None) or _Known(request)
        self._known[request.key] = known
        missing = -(-(request.num_tokens + most) // self._block_size) - len(known.table)
        for key in [key for key in self._known if key not in wanted]:
            if missing <= len(self._free):
                break
            self._forget(key)
        if missing > len(self._free):
            return None
        known.table += [self._free.pop() for _ in range(missing)]
        return _Row(known, most)

    # ==== steps ====

    def _catch_up(self, rows: Sequence[_Row]) -> list[_Row]:
        """Compute what is not known of the requests, those that lack least first, and guess a token
        for each that is complete. Returns these."""
        left, pieces = self._max_batched_tokens, list[_Row]()
        for missing, row in sorted(((r.known.settle(), r) for r in rows), key=lambda each: each[0]):
            known, count = row.known, min(missing, left)
            start = known.num_tokens
            row.token_ids = known.request.token_ids(start, start + count)
            if count and max(row.token_ids) < self._vocab_size:
                row.is_complete = count == missing
                pieces.append(row)
                left -= count
        going_on = self._run(pieces)
        for row in pieces:
            row.known.num_tokens += len(row.token_ids)
        return going_on

    def _guess(self, rows: list[_Row]) -> None:
        """Guess behind guesses, a token for each request in a step."""
        while rows := [row for row in rows if len(row.draft) < row.most]:
            start_s = self._clock()
            for row in rows:
                row.token_ids = row.draft[-1:]
            going_on = self._run(rows)
            for row in rows:
                row.known.guesses += row.token_ids
            rows = going_on
            step_s = self._clock() - start_s
            self.step_s += NEWEST * (step_s - self.step_s) if self.step_s else step_s

    def _run(self, rows: list[_Row]) -> list[_Row]:
        """Compute the rows' tokens; return those that have gained a guess."""
        if not rows:
            return []
        rows = sorted(rows, key=lambda row: len(row.token_ids))  # short ones first, as in any batch
        batch = ScheduledBatch(tuple(row.scheduled() for row in rows))
        gained: list[_Row] = []
        for row, output in zip(rows, self._runner.launch(batch).result(), strict=True):
            if output.token_ids and output.token_ids[0] < self._vocab_size:
                row.draft += output.token_ids
                gained.append(row)
        return gained
