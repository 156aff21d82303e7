"""Generation: run everything one HTTP request asks an engine for, from submit to the last byte.

`start` waits for the first texts, so that errors can still be a status; then `first_events` and
`next_events` write the answer piece by piece, or `whole` at once. However it ends, `close` frees
what it holds in the engine.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from msgspec import structs

from deployments.fleet.protocol import Submit
from deployments.ingress.api.block_reply import num_reasoning_tokens
from deployments.ingress.api.reply import Reply, Times, Usage
from deployments.ingress.choice import Choice
from deployments.ingress.http_errors import from_engine
from deployments.ingress.metrics import Gaps, Metrics
from deployments.ingress.model_resolver import Target
from deployments.ingress.prompt_texts import in_thread
from deployments.ingress.vllm_metrics import LiveRequest
from deployments.policy.canary import Answered
from deployments.usage.meter import NO_CHARGE, Charge
from engine.messages import RequestError, RequestOutput, TokenLogprobs
from engine.scheduler.request import MAX_LOGPROBS

NewTexts = dict[Choice, str]
PromptLogprobs = Sequence[TokenLogprobs | None]


@dataclass(frozen=True, slots=True)
class Plan:
    """What to submit and how to answer. Choice i of prompt p has index p*n + i."""

    model_name: str
    target: Target
    submits: Sequence[Submit]
    n: int
    make_choice: Callable[[int, RequestOutput | None], Choice]
    reply: Reply
    include_usage: bool = False
    is_prompt_only: bool = False  # max_tokens 0: the engine's one token is not shown
    headers: Mapping[str, str] = field(default_factory=dict[str, str])  # of the answer
    answer_id: str = ""  # what the answer calls itself
    num_best: int | None = None  # choices of a prompt that are shown: the likeliest by token


class Generation:
    """The reader of one queue. Not reusable."""

    def __init__(
        self,
        plan: Plan,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
        charge: Charge = NO_CHARGE,
    ) -> None:
        self._plan = plan
        self._charge = charge
        # Tokens of all choices; of them in events, and of these handed over to be sent.
        self._num_tokens = self._num_written = self._num_sent = 0
        self._num_begun = (0, 0)  # choices, and prompts whose first metrics have come
        self._metrics = metrics
        self._clock = clock
        self._link = plan.target.model.link
        self._queue = self._link.open(plan.submits)
        requests = [submit.request for submit in plan.submits]
        ids = [request.request_id for request in requests]
        self._first_index = {request_id: at * plan.n for at, request_id in enumerate(ids)}
        self._num_cached: dict[str, int] = {}
        self._num_drafted = self._num_accepted = 0
        self._load_bytes = 0  # as the first metrics of each prompt say
        self._choices: dict[int, Choice] = {}
        self._num_open = plan.n * len(ids)
        self._has_left = False
        self._prompt_logprobs: dict[int, PromptLogprobs] = {}  # by prompt
        self._first: NewTexts = {}
        self._has_opened = False
        self._read_s = self._written_s = clock()
        self._arrival_s = self._read_s - plan.target.held_s
        self._live = _count_live(plan, metrics)
        self._queue_s = 0.0
        self._gaps = Gaps()
        self._first_s: dict[int, float] = {}
        self._last_s: dict[int, float] = {}
        self._error: RequestError | None = None

    async def start(self) -> None:
        """Wait for the first texts. Raises ApiError if an error comes first."""
        self._first = await self._next()

    @property
    def is_open(self) -> bool:
        """Tell whether more events follow."""
        return self._num_open > 0

    @property
    def quiet_s(self) -> float:
        """Measure for how long there has been nothing to write."""
        return self._clock() - self._written_s

    def wake(self) -> None:
        """Let the reader that waits for texts go on without any."""
        self._queue.wake()

    def first_events(self) -> bytes:
        """Write server-sent events: how every choice begins, and the first texts."""
        return self._write(self._first)

    async def next_events(self) -> bytes:
        """Write the events of all new texts; perhaps none. Raises ApiError."""
        return self._write(await self._next())

    async def whole(self) -> bytes:
        """Write the answer as one document. Raises ApiError."""
        parts: dict[int, list[str]] = {}
        texts = self._first
        while True:
            for choice, text in texts.items():
                parts.setdefault(choice.index, []).append(text)
            if not self._num_open:
                break
            texts = await self._next()
        choices = [self._choices[index] for index in range(self._num_choices)]
        for choice in choices:
            choice.prompt_logprobs = self._prompt_logprobs.get(choice.index // self._plan.n)
        pairs = [(choice, "".join(parts.get(choice.index, ()))) for choice in choices]
        if self._plan.num_best is not None:
            pairs = _best(pairs, self._plan.n, self._plan.num_best)
        shown, texts_of = [choice for choice, _ in pairs], [text for _, text in pairs]
        reply, usage = self._plan.reply, self.usage()
        num_entries = sum(len(entries) for entries in self._prompt_logprobs.values())
        return await in_thread(
            lambda: reply.whole(shown, texts_of, usage), num_entries * MAX_LOGPROBS
        )

    def headers(self) -> dict[str, str]:
        """List the headers of the answer that are known before it is."""
        return {**self._plan.headers, **self._plan.reply.headers(self._plan.target.model.id)}

    def headers_of_whole(self) -> dict[str, str]:
        """List all headers of an answer that has been written as one document."""
        return {**self.headers(), **self._plan.reply.headers_of_whole(self.usage(), self._times())}

    def _times(self) -> Times:
        arrival_s = self._arrival_s
        first_s, last_s = min(self._first_s.values()), max(self._last_s.values())
        return Times(first_s - arrival_s, last_s - arrival_s, self._queue_s)

    def note_sent(self) -> None:
        """Charge for the tokens of all events that have been written: they have been sent."""
        self._num_sent = self._num_written
        self._charge.sent(self._num_sent, 0)

    def note_all_sent(self) -> None:
        """Charge for the whole document: it has been sent."""
        self._charge.sent(self.usage().num_output_tokens, self._num_reasoning())

    @property
    def finish_reasons(self) -> set[str]:
        """Why the choices that have ended did."""
        return {each.finish_reason for each in self._choices.values() if each.finish_reason}

    def usage(self) -> Usage:
        prompts = [submit.request.prompt_token_ids for submit in self._plan.submits]
        is_prompt_only = self._plan.is_prompt_only
        num_output = sum(len(choice.token_ids) for choice in self._choices.values())
        return Usage(
            num_prompt_tokens=sum(map(len, prompts)),
            num_cached_tokens=sum(self._num_cached.values()),
            num_output_tokens=0 if is_prompt_only else num_output,
            num_drafted_tokens=self._num_drafted,
            num_accepted_tokens=self._num_accepted,
        )

    def close(self) -> None:
        """Abort what has not ended, and record the figures. Must be called exactly once."""
        self._link.release(self._queue)
        usage, label = self.usage(), self._plan.target.label
        self._metrics.observe_gaps(label, self._gaps)
        num_read, num_output = self._num_read_tokens(), usage.num_output_tokens
        self._metrics.count_tokens(label, num_read, usage.num_cached_tokens, num_output)
        self._live.end()
        self._tell_arm()
        model, vllm = self._plan.target.model.id, self._metrics.vllm
        vllm.observe_gaps(model, self._gaps.counts, self._gaps.sum_s)
        vllm.count_tokens(model, num_read, num_output)
        vllm.count_aborted(model, self._num_open)
        if self._num_sent:
            self._charge.sent(self._num_sent, min(self._num_reasoning(), self._num_sent))

    def _tell_arm(self) -> None:
        """Report what came of the request to the rollout that it is part of."""
        arm = self._plan.target.arm
        if arm is None:
            return
        if self._error is not None:
            arm.failed(self._error)
        elif not self.is_open:
            arm.answered(self._answered())

    def _answered(self) -> Answered:
        choices = list(self._choices.values())
        reasons = Counter(str(choice.finish_reason) for choice in choices)
        cut = reasons["length"] / len(choices)
        has_form = any(submit.request.sampling.grammar for submit in self._plan.submits)
        return Answered(
            ttft_s=min(self._first_s.values()) - self._arrival_s,
            num_tokens=sum(len(choice.token_ids) for choice in choices) / len(choices),
            cut=cut,
            invalid=cut if has_form else None,  # what must match a grammar does, once it is whole
            stop_reasons=reasons,
        )

    def _num_read_tokens(self) -> int:
        """Count the tokens of prompts that brought an answer or its beginning."""
        submits, n = self._plan.submits, self._plan.n
        begun = {index // n for index in self._choices}
        return sum(len(submits[at].request.prompt_token_ids) for at in begun)

    def _num_reasoning(self) -> int:
        return sum(map(num_reasoning_tokens, self._choices.values()))

    def _charge_read(self) -> None:
        """Charge for prompts, once their answers have begun."""
        num_begun = len(self._choices), len(self._num_cached)
        if num_begun == self._num_begun:
            return
        self._num_begun = num_begun
        ttft_s = min(self._first_s.values(), default=None)
        self._charge.read(
            self._num_read_tokens(),
            sum(self._num_cached.values()),
            self._load_bytes,
            self._queue_s,
            None if ttft_s is None else ttft_s - self._arrival_s,
        )

    def leave(self) -> None:
        """Note that the client does not wait for the rest: its prompts count as read."""
        self._has_left = True

    @property
    def num_used(self) -> tuple[int, int]:
        """Count the tokens of prompts and answers that count against the tenant's limits."""
        usage = self.usage()
        num_prompt = usage.num_prompt_tokens if self._has_left else self._num_read_tokens()
        return num_prompt, usage.num_output_tokens

    @property
    def _num_choices(self) -> int:
        return self._plan.n * len(self._plan.submits)

    # ---- new texts -----------------------------------------------------------------------

    async def _next(self) -> NewTexts:
        """Wait for what the open choices gain, one text per choice."""
        texts: NewTexts = {}
        items = await self._queue.next_batch()
        now = self._read_s = self._clock()
        for item in items:
            if isinstance(item, tuple):
                request_id, index, token_ids = item
                choice = self._choices.get(self._first_index[request_id] + index)
                if choice is None:
                    choice = self._new_choice(request_id, index, None, texts)
                if choice.finish_reason is not None:
                    continue  # after a stop string
                num_before = len(choice.token_ids)
                text = choice.push(token_ids)
            else:
                choice = self._choice_of(item, texts)
                was_open = choice.finish_reason is None
                num_before = len(choice.token_ids)
                text = self._take(choice, item)
                if not was_open:
                    continue
            self._num_tokens += len(choice.token_ids) - num_before
            self._stamp(choice, now)
            if choice.finish_reason is not None:
                self._stop_in_engine(choice)
            texts[choice] = texts[choice] + text if choice in texts else text
        self._charge_read()
        return texts

    def _take(self, choice: Choice, output: RequestOutput) -> str:
        self._book(output)
        if output.finish_reason is None:
            return choice.push(output.token_ids, output.logprobs)
        if self._plan.is_prompt_only:
            output = structs.replace(output, token_ids=[], logprobs=None, stop_token_id=None)
        return choice.finish(output)

    def _choice_of(self, output: RequestOutput, texts: NewTexts) -> Choice:
        if output.error is not None:
            self._error = output.error
            raise from_engine(output.error, self._plan.model_name)
        first = self._first_index[output.request_id]
        if output.prompt_logprobs is not None:
            self._prompt_logprobs[first // self._plan.n] = output.prompt_logprobs
        choice = self._choices.get(first + output.index)
        if choice is None:
            choice = self._new_choice(output.request_id, output.index, output, texts)
        return choice

    def _new_choice(
        self, request_id: str, index: int, output: RequestOutput | None, texts: NewTexts
    ) -> Choice:
        at = self._first_index[request_id] + index
        choice = self._choices[at] = self._plan.make_choice(at, output)
        texts[choice] = choice.opening
        return choice

    def _book(self, output: RequestOutput) -> None:
        """Record what a request's first metrics say of its prompt, whatever the choices, and each
        choice's last ones of its drafts."""
        metrics = output.metrics
        if metrics is not None and output.finish_reason is not None:
            self._num_drafted += metrics.num_drafted_tokens
            self._num_accepted += metrics.num_accepted_tokens
        if metrics is not None and output.request_id not in self._num_cached:
            self._num_cached[output.request_id] = metrics.num_cached_tokens
            self._load_bytes += metrics.load_bytes
            self._queue_s = max(self._queue_s, metrics.queue_s)
            self._metrics.observe_queue(self._plan.target.label, metrics.queue_s)
            self._metrics.vllm.observe_queue(self._plan.target.model.id, metrics.queue_s)

    def _stop_in_engine(self, choice: Choice) -> None:
        """Abort a choice that has ended here, at a stop string, unless it has ended there too."""
        self._link.end_choice(self._queue, *divmod(choice.index, self._plan.n))

    def _stamp(self, choice: Choice, now: float) -> None:
        """Time one item of a choice: its first, the gap since the last, its end."""
        last = self._last_s.get(choice.index)
        if last is None:
            self._first_s[choice.index] = now
            self._live.begin()
        else:
            self._gaps.observe(now - last)
        self._last_s[choice.index] = now
        if choice.finish_reason is not None:
            self._num_open -= 1
            ttft_s, e2e_s = self._first_s[choice.index] - self._arrival_s, now - self._arrival_s
            num_tokens, target = len(choice.token_ids), self._plan.target
            self._metrics.observe_choice(target.label, ttft_s, e2e_s, num_tokens)
            self._metrics.vllm.observe_choice(
                target.model.id, ttft_s, e2e_s, num_tokens, choice.finish_reason
            )

    def _write(self, texts: NewTexts) -> bytes:
        """Write events; behind the last one of all choices, the end of the stream."""
        reply = self._plan.reply
        chunks: list[bytes] = []
        if not self._has_opened and texts:
            self._has_opened = True
            chunks.append(reply.begin(self.usage()))
            chunks.extend(map(reply.opening, range(self._num_choices)))
        for choice, text in texts.items():
            if text:
                chunks.append(reply.text(choice, text))
            if choice.finish_reason is not None:
                chunks.append(reply.closing(choice))
        if not self.is_open:
            chunks.append(reply.ending(self.usage() if self._plan.include_usage else None))
        self._num_written = 0 if self._plan.is_prompt_only else self._num_tokens
        events = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        if events:
            self._written_s = self._read_s
        return events


def _best(pairs: Sequence[tuple[Choice, str]], n: int, num_best: int) -> list[tuple[Choice, str]]:
    """Keep of each prompt's n choices the likeliest by token, and number them anew."""
    kept: list[tuple[Choice, str]] = []
    for start in range(0, len(pairs), n):
        ordered = sorted(pairs[start : start + n], key=lambda pair: -pair[0].mean_logprob)
        for choice, text in ordered[:num_best]:
            choice.index = len(kept)
            kept.append((choice, text))
    return kept


def _count_live(plan: Plan, metrics: Metrics) -> LiveRequest:
    ref = plan.target.adapter_ref
    name, digest = (None, None) if ref is None else (plan.model_name, ref.digest)
    return metrics.vllm.arrive(plan.target.model.id, name, digest)
