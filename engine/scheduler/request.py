"""Request: one generation in flight and its sampling parameters.

Plain data and the arithmetic on it; the scheduler makes every decision.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum, StrEnum

from engine.scheduler.acceptance import Acceptance
from engine.scheduler.classes import Flow, PriorityClass
from engine.scheduler.prompt_lookup import PromptLookup
from engine.scheduler.token_rules import NO_RULES, TokenRules

MAX_LOGPROBS = 20
# Far above what clients send (a few end tokens, at most 300 biases to OpenAI's own servers); they
# bound what one request can cost a step.
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIASES = 1024
MAX_ALLOWED_TOKEN_IDS = 1024
MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS = 256, 4096  # token sequences; tokens of all
MAX_GRAMMAR_BYTES = 2**18
MAX_PRIORITY = 2**31 - 1  # in both directions
POOLINGS = ("mean", "last", "cls")
MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 0.01, 100.0  # keep float32 logits finite


class InvalidRequest(ValueError):
    """A parameter is out of range; the message names the value and the range."""


class RequestStatus(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Parameters of sampling. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off.

    With `pooling` nothing is sampled: the request ends with its prompt, whose hidden states are
    pooled.

    `seed` is always present: the ingress draws one if the client gave none, so that the request
    can be resumed on another replica with the same tokens.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    eos_token_ids: tuple[int, ...] | None = None  # the adapter's own; None: the model's
    logprobs: int | None = None  # None: off; k: of the chosen token and the top k
    prompt_logprobs: int | None = None
    grammar: str | None = None  # what the output must match, in llguidance's own format
    pooling: str | None = None  # one of POOLINGS
    bad_words: tuple[tuple[int, ...], ...] = ()  # token sequences that no output contains
    allowed_token_ids: tuple[int, ...] | None = None  # None: all

    def __post_init__(self) -> None:
        _check_grammar(self.grammar)
        if self.pooling is not None and self.pooling not in POOLINGS:
            raise InvalidRequest(f"pooling must be one of {POOLINGS}, not {self.pooling!r}")
        _check_words(self.bad_words, self.allowed_token_ids)
        _check_length("stop_token_ids", len(self.stop_token_ids), MAX_STOP_TOKEN_IDS)
        _check_length("eos_token_ids", len(self.eos_token_ids or ()), MAX_STOP_TOKEN_IDS)
        _check_length("logit_bias", len(self.logit_bias), MAX_LOGIT_BIASES)
        _check("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _check("min_tokens", self.min_tokens, 0, self.max_tokens)
        _check("temperature", self.temperature, 0.0, 100.0)
        _check("top_k", self.top_k, 0, 2**31 - 1)
        _check("top_p", self.top_p, 0.0, 1.0, low_excluded=True)
        _check("min_p", self.min_p, 0.0, 1.0)
        _check(
            "repetition_penalty",
            self.repetition_penalty,
            MIN_REPETITION_PENALTY,
            MAX_REPETITION_PENALTY,
        )
        _check("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check("seed", self.seed, -(2**63), 2**63 - 1)
        _check_biases(self.logit_bias)
        for name in ("logprobs", "prompt_logprobs"):
            if (value := getattr(self, name)) is not None:
                _check(name, value, 0, MAX_LOGPROBS)

    def end_token_ids(self, eos_token_ids: Iterable[int]) -> frozenset[int]:
        """Token ids that end the request once it has `min_tokens`, of a model with these."""
        own = eos_token_ids if self.eos_token_ids is None else self.eos_token_ids
        eos = () if self.ignore_eos else own
        return frozenset((*eos, *self.stop_token_ids))

    @property
    def uses_penalties(self) -> bool:
        return bool(
            self.repetition_penalty != 1.0 or self.presence_penalty or self.frequency_penalty
        )


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """A model folder's values for parameters that a request leaves out; None: not given."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


NO_DEFAULTS = SamplingDefaults()


def _check(name: str, value: float, low: float, high: float, *, low_excluded: bool = False) -> None:
    inside = low < value <= high if low_excluded else low <= value <= high
    if not inside or not math.isfinite(value):
        bracket = "(" if low_excluded else "["
        raise InvalidRequest(f"{name} must be in {bracket}{low}, {high}], not {value}")


def _check_biases(logit_bias: Iterable[tuple[int, float]]) -> None:
    if all(0 <= token_id < 2**31 and -100.0 <= bias <= 100.0 for token_id, bias in logit_bias):
        return  # as nearly always; the names below take five times as long
    for token_id, bias in logit_bias:
        _check("logit_bias token id", token_id, 0, 2**31 - 1)
        _check(f"logit_bias of token {token_id}", bias, -100.0, 100.0)


def _check_words(
    bad_words: tuple[tuple[int, ...], ...], allowed_token_ids: tuple[int, ...] | None
) -> None:
    _check_length("bad_words", len(bad_words), MAX_BAD_WORDS)
    _check_length("bad_words in tokens", sum(map(len, bad_words)), MAX_BAD_WORD_TOKENS)
    if not all(bad_words):
        raise InvalidRequest("bad_words must have at least one token each, not 0")
    num_allowed = 1 if allowed_token_ids is None else len(allowed_token_ids)
    if not 1 <= num_allowed <= MAX_ALLOWED_TOKEN_IDS:
        raise InvalidRequest(
            f"allowed_token_ids must have [1, {MAX_ALLOWED_TOKEN_IDS}] entries, not {num_allowed}"
        )


def _check_grammar(grammar: str | None) -> None:
    if grammar is None:
        return
    try:
        num_bytes = len(grammar.encode())
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"grammar must be text that UTF-8 can encode: {error}") from None
    if num_bytes > MAX_GRAMMAR_BYTES:
        raise InvalidRequest(f"grammar must have [0, {MAX_GRAMMAR_BYTES}] bytes, not {num_bytes}")


def _check_length(name: str, length: int, most: int) -> None:
    if length > most:
        raise InvalidRequest(f"{name} must have [0, {most}] entries, not {length}")


@dataclass(frozen=True, slots=True)
class CacheScope:
    """Which requests may share a KV block: those of one tenant and salt, and as far as its adapter
    acts, of one adapter."""

    tenant: str = ""
    salt: str = ""
    adapter_digest: str = ""  # empty for the base model


@dataclass(slots=True, eq=False)
class Request:
    """One choice of one generation.

    Invariant: 0 <= num_computed_tokens <= num_tokens + num_pending_tokens, and while RUNNING the
    block table covers num_computed_tokens, which includes scheduled ones.
    Only the scheduler writes the mutable fields.
    `forks` are further choices (n > 1) that wait until this one's prompt is computed.
    """

    request_id: str
    prompt_token_ids: Sequence[int]
    sampling: SamplingParams
    arrival_s: float
    scope: CacheScope = CacheScope()
    rules: TokenRules = NO_RULES  # set by the scheduler, the same for all choices
    priority: int = 0  # lower ones go first among those of its flow that wait
    weight: float = 1.0  # its tenant's share, in comparison to others'
    priority_class: PriorityClass = PriorityClass.STANDARD
    index: int = 0  # choice index: seed + index is its random stream
    output_token_ids: list[int] = field(default_factory=list[int])
    num_resumed_tokens: int = 0  # leading output_token_ids that came with the request
    forks: "list[Request]" = field(default_factory=list["Request"])

    flow: Flow = field(init=False)  # whose service it is
    status: RequestStatus = RequestStatus.WAITING
    block_table: list[int] = field(default_factory=list[int])
    block_hashes: list[bytes] = field(default_factory=list[bytes])
    num_charged_tokens: int | None = None  # output tokens charged to its tenant; None: not begun
    num_admitted_tokens: int = 0  # that were known at the last admission: the prefill's
    num_computed_tokens: int = 0
    num_pending_tokens: int = 0  # sampled by steps whose results have not been read
    life: int = 0  # a new number with every admission; 0 unless RUNNING
    num_cached_tokens: int | None = None  # of the prompt, at the first choice's first admission
    num_published_blocks: int = 0
    adapter_start: int | None = None  # position; set by the scheduler, once the adapter is known
    is_nobodys: bool = False  # a probe's: no client pays for it
    load_bytes: int = 0  # of its adapter, as often as a load began for it
    awaited_load: int = 0  # number of the first adapter load that it waited for
    awaits_grammar: bool = False  # not admitted before its grammar is compiled; set by the engine
    jumps_ahead: bool = False  # takes tokens unsampled that its grammar forces; set by the engine
    awaits_proof: bool = False  # its adapter is not proven: its blocks are its own
    lookup: PromptLookup | None = None  # of its tokens, if any were drafted from them
    acceptance: Acceptance | None = None  # of its drafts, if there were any
    draft_match: int = 0  # of the draft in the current step
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0  # of them, those that became output
    finish_reason: FinishReason | None = None
    first_scheduled_s: float | None = None  # kept when the request is preempted
    keeps_seat: bool = False  # no higher class takes it: its class was owed this request

    def __post_init__(self) -> None:
        self.flow = Flow(self.scope.tenant, self.priority_class)

    @property
    def key(self) -> tuple[str, int]:
        return (self.request_id, self.index)

    @property
    def adapter_digest(self) -> str:
        return self.scope.adapter_digest

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens; pending ones do not count."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_remaining_tokens(self) -> int:
        """Tokens, known or pending, that have not been scheduled."""
        num_known = len(self.prompt_token_ids) + len(self.output_token_ids)
        return num_known + self.num_pending_tokens - self.num_computed_tokens

    @property
    def awaits_prompt_logprobs(self) -> bool:
        """Whether they are asked for and still due: they come with the first output."""
        has_output = len(self.output_token_ids) > self.num_resumed_tokens
        return self.sampling.prompt_logprobs is not None and not has_output

    def num_base_rows(self, count: int) -> int:
        """How many of the next `count` tokens are computed without the adapter: the first ones."""
        assert self.adapter_start is not None
        return min(max(self.adapter_start - self.num_computed_tokens, 0), count)

    def token_ids(self, start: int, end: int) -> list[int]:
        """Tokens [start, end) of prompt and output as one sequence, without pending ones."""
        n = len(self.prompt_token_ids)
        if start >= n:  # a decode, nearly always
            return self.output_token_ids[start - n : end - n]
        return [*self.prompt_token_ids[start:end], *self.output_token_ids[: max(end - n, 0)]]
