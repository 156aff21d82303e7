"""Define the plain data between a replica and its engine process. No tensors, no text, no Ray."""

from dataclasses import dataclass, field
from enum import StrEnum

import msgspec

from engine.config import EngineConfig
from engine.framing import Message
from engine.scheduler.classes import PriorityClass
from engine.scheduler.request import NO_DEFAULTS, SamplingDefaults, SamplingParams


class ErrorKind(StrEnum):
    """Reason why a request ended without an answer, or was sent elsewhere."""

    INVALID_REQUEST = "invalid_request"  # the client's fault
    ADAPTER_NOT_FOUND = "adapter_not_found"  # the store has none of that name
    ADAPTER_INVALID = "adapter_invalid"  # the adapter cannot be used with this base
    ADAPTER_DAMAGED = (
        "adapter_damaged"  # its files on this machine are not those that were verified
    )
    ADAPTER_UNAVAILABLE = "adapter_unavailable"  # the store cannot be reached
    OVERLOADED = "overloaded"  # the replica's queue is full
    TOO_LATE = "too_late"  # its first token has not come in the time that it allows
    ENGINE_ERROR = "engine_error"  # a step failed; the engine goes on
    ENGINE_DIED = "engine_died"  # the process died or hung; it is being restarted
    # A request that ends with one of these goes to another replica; clients never see them.
    DRAINING = "draining"  # the replica is being stopped and takes nothing new
    HANDED_BACK = "handed_back"  # the replica is being stopped and cannot finish the request
    STALE_STREAM = "stale_stream"  # the ingress has given up the stream it was submitted for


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """An adapter's identity, and the folder of its verified files.

    `vocab_size` are the rows of its own embedding. Token ids from the base's number on are valid
    for its requests alone; if it has fewer, those that it lacks are not. 0: it has the base's.
    """

    digest: str
    path: str
    vocab_size: int = 0


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """A generation with n choices. With `output_token_ids`, it resumes after them (n = 1).

    Those of a higher class go first. Within a class tenants that wait get tokens in the ratio of
    their `weight`s, and of a tenant's requests those of a lower `priority` go first.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    n: int = 1
    adapter_folder: AdapterFolder | None = None
    tenant: str = ""
    cache_salt: str = ""
    output_token_ids: list[int] = field(default_factory=list[int])
    priority: int = 0
    weight: float = 1.0
    priority_class: PriorityClass = PriorityClass.STANDARD


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural-log probabilities at one position, before temperature and filters."""

    logprob: float
    top: tuple[tuple[int, float], ...]  # (token id, logprob), most likely first
    rank: int = 0  # of a prompt's token: 1 is the likeliest


@dataclass(frozen=True, slots=True)
class RequestError:
    """Error that ended a request. `message` is `encodable`, as it may quote an adapter's files.

    `retry_after_s` are whole seconds after which there should be room; None is not known.
    """

    kind: ErrorKind
    message: str
    retry_after_s: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "message", encodable(self.message))


def encodable(text: str) -> str:
    """Escape lone surrogates, which JSON files may contain and UTF-8 cannot represent."""
    return text.encode(errors="backslashreplace").decode()


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """What a choice took so far; the queue is from arrival to being scheduled.

    `num_cached_tokens` are the prompt's that were cached when the first choice was first admitted:
    neither what the choices share nor what is cached after a preemption counts. Of the drafted
    tokens that the steps verified, the accepted ones became output. `load_bytes` is the size of the
    adapter, as often as this request had it loaded.
    """

    queue_s: float
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0
    load_bytes: int = 0


class RequestOutput(msgspec.Struct, frozen=True):
    """New tokens of one choice from one step. The last output of a choice has a finish_reason.

    finish_reason: "stop" (end-of-sequence or a stop token), "length", "abort" or "error";
    `stop_token_id` is the token that ended the choice, and also the last of `token_ids`.
    `prompt_logprobs`, if requested, come with the first output; the entry of the first prompt
    token is None. `metrics` come with the first output of choice 0, and with each choice's last.
    `embedding` is the pooled hidden state [hidden_size] after the last norm, float32 in
    little-endian order, not normalised: it comes with the only output of a request with pooling.

    A struct, because one is made per request and step, at a fifth of a frozen dataclass's cost.
    """

    request_id: str
    index: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: str | None = None
    stop_token_id: int | None = None
    error: RequestError | None = None
    metrics: RequestMetrics | None = None
    embedding: bytes | None = None


# (request_id, index, token_ids) for an output without other fields, as nearly all are: a tuple
# takes a quarter of a dataclass's time to encode and decode, and a third of its bytes. Readers tell
# the two apart by isinstance(item, tuple) and unpack the tuple, which costs the least per item.
TokenItem = tuple[str, int, list[int]]
Item = TokenItem | RequestOutput


def to_item(output: RequestOutput) -> Item:
    """Return the tuple if it holds everything, else the output itself."""
    is_plain = (
        output.finish_reason is None
        and output.logprobs is None
        and output.prompt_logprobs is None
        and output.error is None
        and output.metrics is None
        and output.embedding is None
    )
    return (output.request_id, output.index, output.token_ids) if is_plain else output


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """Facts about a started engine."""

    max_model_len: int
    vocab_size: int
    num_blocks: int  # if no adapter takes memory
    block_size: int
    eos_token_ids: tuple[int, ...]
    device: str
    dtype: str
    kernels: str  # native-amx, native-avx512, native-avx2, torch or triton
    weight_bytes: int
    hidden_size: int = 0  # of an embedding
    named_eos_token_ids: tuple[int, ...] = ()  # of eos_token_ids, without the tokenizer's own
    sampling_defaults: SamplingDefaults = NO_DEFAULTS  # which the ingress applies
    grammar_refusal: str = ""  # why no request may have a grammar; empty if it may
    load_s: float = 0.0  # from the start of the process; measured by its client


def describe_engine(config: EngineConfig, info: EngineInfo) -> str:
    """Say in a few words what computes: the base's format and the kernels."""
    weights = info.dtype if config.quantization == "none" else config.quantization
    return f"{weights}, {info.kernels}"


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Current gauges and totals since the start."""

    num_running: int = 0
    num_waiting: int = 0
    num_blocks_used: int = 0
    num_blocks_cached: int = 0
    num_blocks_total: int = 0  # what the adapters in use leave
    queued_tokens: int = 0
    resident_adapters: tuple[str, ...] = ()
    adapters_in_memory: tuple[str, ...] = ()  # on the device or the host; a bounded number
    total_steps: int = 0
    total_prompt_tokens: int = 0
    total_cached_tokens: int = 0
    total_output_tokens: int = 0
    total_preemptions: int = 0
    total_step_s: float = 0.0
    total_drafts: int = 0
    total_drafted_tokens: int = 0
    total_accepted_tokens: int = 0
    tokens_per_s: float = 0.0  # as engine.scheduler.step_rates has it, and the next two
    step_s: float = 0.0
    row_s: float = 0.0
    adapters_used: float = 0.0  # of the room for adapters, by those that requests need


@dataclass(frozen=True, slots=True)
class AdapterVerdict:
    """What a probe has shown of an adapter; differences are those of logprobs.

    outcome: "proven", "no_effect" or "failed".
    """

    digest: str
    outcome: str
    probe: str  # SHA-256 of the probe's tokens and of the logprobs that were served
    effect: float  # between the base and the adapter, as its weights say
    error: float  # between that and what was served
    margin: float  # the largest error that passes
    reason: str = ""  # why it failed, or has no effect


FlowTokens = tuple[str, PriorityClass, float]  # tenant, class, tokens as fairness counts them


# ==== from a replica to its engine process ====


class StartEngine(Message):
    config: EngineConfig


class AddRequest(Message):
    request: GenerateRequest


class AbortRequest(Message):
    request_id: str
    index: int | None = None  # of the only choice that is meant


class ServedElsewhere(Message):
    """What tenants were charged with by other engines of the same model."""

    served: tuple[FlowTokens, ...]


class Ping(Message):
    """Answered with StepOutputs, as proof that the step loop is running."""


ToEngine = StartEngine | AddRequest | AbortRequest | ServedElsewhere | Ping


# ==== from the engine process to its replica ====


class EngineReady(Message):
    info: EngineInfo


class StartFailed(Message):
    reason: str


class Busy(Message):
    """Announces work that may take longer than a step: the next message may be long in coming.

    It comes again and again while the model is loaded, as the only sign of life. `patience_s`: for
    how long the process may be silent, if the client's own limit is too short for this work.
    """

    work: str
    patience_s: float | None = None


class StepOutputs(Message):
    """New outputs of one step. `stats` come at most ten times a second, and after a Ping.

    `verdicts` are those on adapters that were probed since the last one. `served`: with the stats,
    what tenants were charged with since the last ones.
    """

    items: list[Item]
    stats: EngineStats | None = None
    verdicts: tuple[AdapterVerdict, ...] = ()
    served: tuple[FlowTokens, ...] = ()


FromEngine = EngineReady | StartFailed | Busy | StepOutputs
