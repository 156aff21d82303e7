"""Step: collects the rows of a step and turns them into a ScheduledBatch."""

from array import array

from engine.scheduler.adapter_slots import AdapterSlots
from engine.scheduler.batch import PENDING, ScheduledBatch, ScheduledRequest
from engine.scheduler.memory import MemoryChanges
from engine.scheduler.request import Request
from engine.scheduler.step_budget import PromptTime


class Step:
    """The requests of a step and their token counts; `budget` is how many tokens are left."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.rows: list[tuple[Request, int]] = []
        self.decodes: list[Request] = []  # one token each, without rows
        self.lacks_blocks = False  # for a running request; then none is admitted
        self.num_promised = 0  # waiting requests whose adapter is being copied to the device
        self.promised_blocks = 0  # blocks reserved for these
        self.narrow: list[Request] = []  # decodes that know more tokens than the one in their row
        self.drafts: dict[tuple[str, int], list[int]] = {}  # of rows; not in their counts
        self.prompt_time: PromptTime | None = None  # None: no limit in time
        self._keys: dict[tuple[str, int], None] = {}

    @property
    def is_full(self) -> bool:
        """Whether no piece of a prompt should be added."""
        return not self.budget or (self.prompt_time is not None and self.prompt_time.is_over)

    def piece(self, request: Request, num_remaining: int) -> int:
        """Return how many of the request's remaining tokens this step may compute."""
        most = min(num_remaining, self.budget)
        if self.prompt_time is None or most <= 1:
            return most
        return self.prompt_time.piece(request.num_computed_tokens, most)

    def add(self, request: Request, count: int) -> None:
        if self.prompt_time is not None:
            self.prompt_time.spend(request.num_computed_tokens, count)
        self.rows.append((request, count))
        self.budget -= count

    def take_decodes(self, requests: list[Request]) -> None:
        """Add requests with one token each, for which there are blocks. They have no rows."""
        self.decodes = requests
        self.budget -= len(requests)

    def widen(self, request: Request, more: int) -> None:
        """Add tokens to a decode's row."""
        at = next(at for at, row in enumerate(self.rows) if row[0] is request)
        count = self.rows[at][1]
        self.rows[at] = (request, count + more)
        self.budget -= more
        if self.prompt_time is not None:
            self.prompt_time.lend(request.num_computed_tokens + count, more)

    def has(self, request: Request) -> bool:
        if not self._keys:  # seldom asked at all
            self._keys = {decode.key: None for decode in self.decodes}
        known = len(self._keys) - len(self.decodes)
        for other, _ in self.rows[known:]:  # those added since the last call
            self._keys[other.key] = None
        return request.key in self._keys

    def to_batch(self, adapters: AdapterSlots, changes: MemoryChanges) -> ScheduledBatch:
        """Return the step as plain data; from here on its tokens count as computed."""
        drafts = self.drafts
        requests = [
            _take(r, count, adapters, drafts.get(r.key, []) if drafts else [])
            for r, count in self.rows
        ]
        if drafts or any(count > 1 for _, count in self.rows):
            requests.sort(key=lambda r: len(r.token_ids))  # stable: short ones first
        return ScheduledBatch(
            requests=tuple(requests),
            adapter_evictions=changes.evictions,
            moves=changes.moves,
            adapter_loads=changes.loads,
            grammar_rows=tuple(
                i for i, r in enumerate(requests) if r.sampling.grammar is not None and r.samples
            ),
        )


def _take(
    request: Request, count: int, adapters: AdapterSlots, drafts: list[int]
) -> ScheduledRequest:
    """Take the request's next `count` tokens into the step, and guesses behind them."""
    num_base_rows = request.num_base_rows(count) if request.scope.adapter_digest else count
    has_adapter = num_base_rows < count
    start = request.num_computed_tokens
    end = request.num_computed_tokens = start + count
    sampling = request.sampling
    pending = request.num_pending_tokens
    num_outputs = len(request.output_token_ids) + pending
    num_tokens = len(request.prompt_token_ids) + num_outputs
    samples = end == num_tokens and sampling.pooling is None
    request.num_pending_tokens += samples
    history = None
    if sampling.uses_penalties:
        history = (list(request.prompt_token_ids), list(request.output_token_ids))
    return ScheduledRequest(
        request_id=request.request_id,
        choice=request.index,
        token_ids=[PENDING] if pending else request.token_ids(start, end) + drafts,
        start=start,
        block_table=tuple(request.block_table),
        adapter_slot=adapters.slot(request.adapter_digest) if has_adapter else 0,
        sampling=sampling,
        samples=samples,
        forbidden_token_ids=request.rules.forbidden(
            num_outputs + 1 >= sampling.min_tokens, request.output_token_ids
        ),
        history=history,
        prompt_targets=(
            None if sampling.prompt_logprobs is None else _prompt_targets(request, start, end)
        ),
        life=request.life,
        biases=request.rules.biases,
        allowed_token_ids=request.rules.allowed_token_ids,
        pooled=(
            None
            if sampling.pooling is None
            else _pooled_rows(sampling.pooling, start, end, request.num_prompt_tokens)
        ),
        num_base_rows=num_base_rows if has_adapter else 0,
        num_drafts=len(drafts),
        forbidden_after_drafts=_forbidden_after(request, drafts) if drafts else (),
    )


def _forbidden_after(request: Request, drafts: list[int]) -> "tuple[array[int], ...]":
    """List what may not be sampled after 1, 2, ... guesses; empty if that is always the same."""
    num_outputs, least = len(request.output_token_ids), request.sampling.min_tokens
    if not request.rules.needs_output and num_outputs + 1 >= least:
        return ()
    output, forbidden = list(request.output_token_ids), list["array[int]"]()
    for token_id in drafts:
        output.append(token_id)
        forbidden.append(request.rules.forbidden(len(output) + 1 >= least, output))
    return tuple(forbidden)


def _prompt_targets(request: Request, start: int, end: int) -> list[int] | None:
    """Prompt tokens that follow positions [start, end), if prompt logprobs are asked for."""
    if not request.awaits_prompt_logprobs or start >= request.num_prompt_tokens - 1:
        return None
    return request.token_ids(start + 1, min(end + 1, request.num_prompt_tokens))


def _pooled_rows(pooling: str, start: int, end: int, num_prompt: int) -> tuple[int, int] | None:
    """Choose the rows of positions [start, end) that are pooled; None if there are none."""
    wanted = {"mean": (start, end), "cls": (0, 1), "last": (num_prompt - 1, num_prompt)}
    first, stop = max(wanted[pooling][0], start), min(wanted[pooling][1], end)
    return (first - start, stop - start) if first < stop else None
