"""Plain data between a replica and its engine process. No tensors, no text, no Ray."""

from dataclasses import dataclass, field
from enum import StrEnum

from engine.config import EngineConfig
from engine.framing import Message
from engine.scheduler.request import SamplingParams
from engine.scheduler.timings import RequestMetrics


class ErrorKind(StrEnum):
    """Why a request ended without an answer, or was sent elsewhere."""

    INVALID_REQUEST = "invalid_request"  # the client's fault
    ADAPTER_NOT_FOUND = "adapter_not_found"  # the store has none of that name
    ADAPTER_INVALID = "adapter_invalid"  # the adapter cannot be used with this base
    ADAPTER_UNAVAILABLE = "adapter_unavailable"  # the store cannot be reached
    OVERLOADED = "overloaded"  # the replica's queue is full
    ENGINE_ERROR = "engine_error"  # a step failed; the engine goes on
    ENGINE_DIED = "engine_died"  # the process died or hung; it is being restarted
    # A request that ends with one of these goes to another replica; clients never see them.
    DRAINING = "draining"  # the replica is being stopped and takes nothing new
    HANDED_BACK = "handed_back"  # the replica is being stopped and cannot finish the request
    STALE_STREAM = "stale_stream"  # the ingress has given up the stream it was submitted for


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """An adapter as the engine sees it: its identity and where its verified files are."""

    digest: str
    path: str


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One generation with n choices. `output_token_ids` resumes it in its middle (n = 1)."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    n: int = 1
    adapter_folder: AdapterFolder | None = None
    tenant: str = ""
    cache_salt: str = ""
    output_token_ids: list[int] = field(default_factory=list[int])


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural-log probabilities at one position, before temperature and filters."""

    logprob: float
    top: tuple[tuple[int, float], ...]  # (token id, logprob), most likely first


@dataclass(frozen=True, slots=True)
class RequestError:
    """`message` may quote a file; a lone surrogate in it, which UTF-8 cannot hold, is escaped."""

    kind: ErrorKind
    message: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "message", encodable(self.message))


def encodable(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What one choice gained in one step. The last one of a choice has a finish_reason.

    finish_reason: "stop" (end-of-sequence or a stop token), "length", "abort" or "error";
    `stop_token_id` is the token that ended it, which is also the last of `token_ids`.
    `prompt_logprobs` (if asked for) comes with the choice's first output; its first entry, the
    first prompt token's, is None.
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


# (request_id, choice index, token_ids): an output that says nothing else, as nearly every one
# does. Encoding and decoding a tuple takes a fifth to a tenth of a dataclass's time.
TokenItem = tuple[str, int, list[int]]
Item = TokenItem | RequestOutput


def to_item(output: RequestOutput) -> Item:
    is_plain = (
        output.finish_reason is None
        and output.logprobs is None
        and output.prompt_logprobs is None
        and output.error is None
    )
    return (output.request_id, output.index, output.token_ids) if is_plain else output


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What the engine settled on at start."""

    max_model_len: int
    vocab_size: int
    num_blocks: int  # where no adapter takes memory
    block_size: int
    eos_token_ids: tuple[int, ...]
    device: str
    dtype: str
    kernels: str  # native-avx512, native-avx2 or torch
    weight_bytes: int
    load_s: float


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Gauges of the moment and totals since start, sent at most ten times a second."""

    num_running: int = 0
    num_waiting: int = 0
    num_blocks_used: int = 0
    num_blocks_cached: int = 0
    num_blocks_total: int = 0  # that there can be beside the adapters in use
    queued_tokens: int = 0
    resident_adapters: tuple[str, ...] = ()
    total_steps: int = 0
    total_prompt_tokens: int = 0
    total_cached_tokens: int = 0
    total_output_tokens: int = 0
    total_preemptions: int = 0
    total_step_s: float = 0.0


# ==== from a replica to its engine process ====


class StartEngine(Message):
    config: EngineConfig


class AddRequest(Message):
    request: GenerateRequest


class AbortRequest(Message):
    request_id: str


class Ping(Message):
    """Answered with StepOutputs, as proof that the step loop is running."""


ToEngine = StartEngine | AddRequest | AbortRequest | Ping


# ==== from the engine process to its replica ====


class EngineReady(Message):
    info: EngineInfo


class StartFailed(Message):
    reason: str


class StepOutputs(Message):
    """Everything new after one step. `stats` come at most ten times a second, and after a Ping."""

    items: list[Item]
    stats: EngineStats | None = None


FromEngine = EngineReady | StartFailed | StepOutputs
