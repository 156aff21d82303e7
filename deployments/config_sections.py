"""Defines the sections of the `args` of a configs/*.yaml: every key, its default and its meaning.

`reef config-keys` prints the descriptions for docs/configuration.md.
"""

from collections.abc import Iterable
from dataclasses import fields
from decimal import Decimal, InvalidOperation
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from deployments.policy.admission import Limits
from deployments.policy.autoscaling import RANGES, ScalingPolicy
from deployments.policy.capacity import Objective
from deployments.text.reasoning import THINK_TAGS
from deployments.text.tools.formats import AUTO, FORMATS, NONE
from engine.byte_size import parse_byte_size


def parse_bytes(value: object) -> object:
    """Read a size that is written `2GiB`; other types are left to the field's own check."""
    return parse_byte_size(value) if isinstance(value, str) else value


def parse_price(value: object) -> object:
    """Read a number as the decimal that is written, never as the nearest binary fraction."""
    try:
        return Decimal(str(value)) if type(value) in (int, float, str) else value
    except InvalidOperation:
        return value


def key(default: Any, text: str, *, unset: str = "", live: str = "", **bounds: Any) -> Any:
    """Define an optional key. `unset` describes the meaning of None as the default.

    `live` names the deployments whose `user_config` may change it while they run.
    """
    extra: dict[str, Any] = {"unset": unset, "live": live}
    return Field(default, description=text, json_schema_extra=extra, **bounds)


def _scaling_key(name: str, text: str) -> Any:
    """Define a key of the autoscaling policy, with the policy's own default and range."""
    known = RANGES[name]
    default = getattr(ScalingPolicy(), name)
    return key(default, text, live=ENGINE, ge=known.least, le=known.most)


INGRESS, ENGINE = "Ingress", "Engine"  # deployments
Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(ge=0)]
# A tenant's and an adapter's name, with wildcards, and a version
ADAPTER_PATTERN = (
    r"^([A-Za-z0-9*?][A-Za-z0-9._*?-]{0,95}/)?[A-Za-z0-9*?][A-Za-z0-9._*?-]{0,95}"
    r"(@([1-9][0-9]{0,17}|\*))?$"
)
# Ray's grammar of label selectors
_LABEL = r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
LabelName = Annotated[str, Field(pattern=rf"^([a-z0-9]([a-z0-9.-]{{0,251}}[a-z0-9])?/)?{_LABEL}$")]
LabelValue = Annotated[str, Field(pattern=rf"^!?({_LABEL}|in\({_LABEL}(, ?{_LABEL})*\))$")]
Limit = Annotated[int, Field(ge=1)] | None
Money = Annotated[Decimal, BeforeValidator(parse_price), Field(ge=0, allow_inf_nan=False)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class SpeculationSection(Section):
    """Fields and defaults equal those of SpeculationConfig, which also checks the ranges."""

    method: str = key(
        "none",
        "`ngram` guesses tokens from where the last ones stood before in the request's prompt and "
        "answer, and verifies them beside the next one, which changes no token; only as far as "
        "its guesses pay for themselves; `draft` guesses with the smaller `model`, on a CPU; "
        "`auto` is `ngram` on a CPU, `none` guesses never",
    )
    model: str | None = key(
        None,
        "for `draft`: the folder of a smaller model with the same tokenizer; its KV takes the part "
        "of `memory_bytes` in which it holds as many tokens as the base's in the rest",
        unset="none",
    )
    max_draft_tokens: int = key(16, "tokens guessed for a request in one step, 1 to 64")


class EngineSection(Section):
    """Fields and defaults equal those of EngineConfig, which also checks the ranges."""

    device: str = key("auto", "`cpu` or `cuda`; `auto` takes CUDA where there is one")
    max_num_seqs: int = key(64, "requests in one step")
    max_num_batched_tokens: int | None = key(
        None,
        "tokens in one step, by default at least twice `max_num_seqs`; long prompts are cut into "
        "chunks of what is left, and a stream waits for one chunk at a time",
        unset="128; 512 on a GPU",
    )
    target_step_ms: float | None = key(
        None,
        "how long a step should take while anybody's answer is growing: prompts get pieces that "
        "fit, of at least 16 tokens; lower it for smoother streams and later first tokens",
        unset="at least 50, and 2.5 times a step without prompts; more, the more requests wait "
        "for a first token",
    )
    max_model_len: int | None = key(
        None, "longest prompt and answer together, in tokens", unset="model's, to 8192"
    )
    block_size: int = key(16, "tokens in a KV block")
    memory_bytes: Bytes | None = key(
        None,
        "KV blocks and adapters on the device, in one arena; on a GPU all that the weights leave",
        unset="`2GiB`; a GPU's rest",
    )
    adapter_memory_bytes: Bytes | None = key(
        None, "the most that adapters may take of that", unset="all of it"
    )
    enable_prefix_caching: bool = key(
        True, "prompts that begin alike share KV blocks, within one tenant and adapter"
    )
    kernels: str = key(
        "auto",
        "on a CPU native kernels, where bfloat16 is computed and the machine can run them; on a "
        "GPU `triton`; `torch` does without",
    )
    cuda_graphs: str = key(
        "auto", "on a GPU decode steps are captured at start; `off` launches each kernel"
    )
    flashinfer: str = key(
        "auto",
        "on a GPU it computes the attention of prefills where it is installed and passes its "
        "test; `off` never",
    )
    lora_side_stream: bool = key(
        False,
        "on a GPU `true` computes the adapters' A concurrently with the base's multiplication, on "
        "a stream of its own; it was not measured",
    )
    num_threads: int | None = key(None, "threads of the engine on a CPU", unset="all cores")
    activations: str = key(
        "auto",
        "of 4-bit weights (nf4, GPTQ, AWQ): `int8` multiplies in integers, on a CPU, with many "
        "rows several times as fast; `bf16` is exact; `auto` is `int8` on a CPU in bfloat16",
    )
    output_layer: str = key(
        "auto",
        "`int8` stores the output layer with a scale per token id, on a CPU in bfloat16; `model` "
        "in the model's dtype; `auto` is `int8` there if the linear layers are quantized",
    )
    kv_dtype: str = key("auto", "the model's dtype; `int8` halves the KV cache (bfloat16 on a CPU)")
    max_silence_s: float = key(
        120.0,
        "seconds that the engine's process may say nothing while it loads the model or compiles, "
        "before it is killed and started again",
    )
    structured_output: str = key(
        "auto",
        "where the folder has a tokenizer.json, a process beside the engine holds answers to JSON "
        "schemas, regular expressions and grammars; `off` does without, and refuses such requests",
    )
    speculation: SpeculationSection = SpeculationSection()
    adapter_proof: str = key(
        "auto",
        "before an adapter's first answer a probe must show that it acts as its weights say, or "
        "its requests are refused; `off` trusts what was loaded",
    )
    enable_jump_ahead: bool = key(
        True,
        "on a CPU, tokens of which a grammar leaves no choice are computed together, like a "
        "prompt, and not one in each step; `false` samples each. The answers are the same",
    )


class AutoscalingSection(Section):
    """Chooses the number of replicas between `min` and `max`, so that the objective is kept.

    Names, defaults and ranges are those of Objective and ScalingPolicy.
    """

    ttft_s: float = key(
        2.0, "the objective: seconds to a request's first token", live=ENGINE, gt=0, le=3600
    )
    tpot_s: float = key(
        0.2,
        "the objective: seconds for each further token; bounds a replica's seats",
        live=ENGINE,
        gt=0,
        le=60,
    )
    busy: float = _scaling_key("busy", "the part of a replica's tokens/s and seats to be used")
    kv_used: float = _scaling_key("kv_used", "the part of its KV cache to be used")
    adapters_used: float = _scaling_key(
        "adapters_used", "the part of its room for adapters that those of requests may take"
    )
    drain_s: float = _scaling_key("drain_s", "seconds in which queued prompts should be computed")
    smoothing_s: float = _scaling_key("smoothing_s", "seconds over which arrivals are averaged")
    lookahead_s: float = _scaling_key(
        "lookahead_s", "how far ahead rising arrivals are estimated; a replica's start"
    )
    up_delay_s: float = _scaling_key("up_delay_s", "seconds that a need for more must stand")
    down_delay_s: float = _scaling_key("down_delay_s", "seconds without a need for as many")
    zero_delay_s: float = _scaling_key(
        "zero_delay_s", "with `min: 0`, seconds without a request until the last replica goes"
    )
    down_margin: float = _scaling_key(
        "down_margin", "fewer replicas are wanted only if they would be at most this full, of 1"
    )

    @property
    def objective(self) -> Objective:
        return Objective(self.ttft_s, self.tpot_s)

    @property
    def policy(self) -> ScalingPolicy:
        return ScalingPolicy(**self.model_dump(exclude={"ttft_s", "tpot_s"}))


class ReplicasSection(Section):
    """Engine replicas behind one name. With min < max, their number follows the load."""

    min: int = key(
        1, "engine replicas at least; 0 starts the first one for the first request", ge=0
    )
    max: int | None = key(
        None,
        "engine replicas at most; with `min` < `max` their number follows the load",
        unset="`min`",
        ge=1,
    )
    num_cpus: float = key(1.0, "CPUs that Ray reserves for each", ge=0)
    num_gpus: float = key(0.0, "GPUs that Ray reserves for each", ge=0)
    drain_s: float = key(
        30.0,
        "seconds that a stopped replica's requests have to finish; then they move",
        ge=0,
        le=3600,
    )
    hold_s: float = key(
        120.0,
        "with `min: 0`, seconds that a request may wait for the first replica, then it is a 503; "
        "at each ingress as many wait as `ingress.max_queued_requests`",
        gt=0,
        le=3600,
    )
    prewarm_s: float = key(
        5.0,
        "seconds that a new replica, once its model is loaded, may take to load the adapters that "
        "it will be asked for before it takes requests; the rest is loaded beside them. 0 loads "
        "none ahead",
        ge=0,
        le=600,
    )
    surge_percent: int | None = key(
        None,
        "replicas that a redeploy starts before it stops old ones, in percent, rounded up; 0 stops "
        "old ones first",
        unset="one replica on a CPU with room for it, 0 on a GPU",
        ge=0,
        le=100,
    )
    labels: dict[LabelName, LabelValue] | None = key(
        None,
        "labels that the nodes of its replicas must have, by Ray's label selectors: "
        "`ray.io/accelerator-type: H100`, `ray.io/market-type: '!spot'`, "
        "`ray.io/availability-zone: in(a, b)`",
        unset="any node",
    )
    autoscaling: AutoscalingSection = AutoscalingSection()

    @model_validator(mode="after")
    def _ordered(self) -> "ReplicasSection":
        if self.max is not None and self.max < self.min:
            raise ValueError(f"min={self.min} must be at most max={self.max}")
        if self.most < 1:
            raise ValueError("min=0 needs a max of at least 1")
        return self

    @property
    def most(self) -> int:
        return self.min if self.max is None else self.max


def _known_format(value: str, names: Iterable[str]) -> str:
    if value not in (AUTO, NONE, *names):
        raise ValueError(f"must be {AUTO}, {NONE} or one of {', '.join(sorted(names))}")
    return value


def _known_tool_format(value: str) -> str:
    return _known_format(value, FORMATS)


class EmbeddingsSection(Section):
    pooling: Literal["auto", "off", "mean", "last", "cls"] = key(
        "auto",
        "how `/v1/embeddings` makes one vector of a text's hidden states: their `mean`, the `last` "
        "token's or the first one's (`cls`); `auto` does as the folder's modules.json says, which "
        "sentence-transformers writes, and without one refuses such requests, as `off` does",
    )
    normalize: bool | None = key(
        None,
        "whether vectors have the length 1",
        unset="as modules.json says, else true",
    )


ToolFormat = Annotated[str, AfterValidator(_known_tool_format)]


class AdapterToolFormat(Section):
    adapter: str = Field(
        pattern=ADAPTER_PATTERN,
        description="which adapters: `name` or `tenant/name`, perhaps with `@version`; `*` and `?` "
        "stand for any letters. The first entry that fits counts",
    )
    tool_format: ToolFormat = Field(
        description="how they write calls, as in `models[].tool_format`; `auto` finds it in their "
        "own chat template, or the base's"
    )


class ModelSection(Section):
    id: str = Field(pattern=r"^[^\s@]{1,256}$", description="the base model's name in the API")
    source: str = Field(description="a Hugging Face folder")
    dtype: str = key(
        "auto",
        "`auto` keeps float32 and computes all else in bfloat16; or `float32`, `bfloat16`, "
        "`float16`",
    )
    quantization: str = key(
        "none",
        "`int8`, `nf4`, on a CPU `int4` or, on a GPU of capability 8.9 or higher, `fp8` quantizes "
        "the linear layers as they are loaded; `none` leaves them as the checkpoint has them; "
        "`auto` is `int8` for a dense model on a CPU in bfloat16, else `none`",
    )
    tokenizer: Literal["file", "transformers"] | None = key(
        None,
        "`file` encodes as tokenizer.json says; `transformers` as transformers 5 does, whose "
        "AutoTokenizer replaces parts of some folders' tokenizers; it needs that package, at start "
        "only",
        unset="`file`, and a warning where transformers would replace something",
    )
    generation_config: str = key(
        "auto",
        "`auto` takes temperature, top_p, top_k, min_p and repetition_penalty that a request "
        "leaves out from the folder's generation_config.json; `none` ignores them",
    )
    tool_format: ToolFormat = key(
        "auto",
        "how the model writes calls of tools: `auto` finds it by rendering a call with the chat "
        "template, `none` refuses tools, and a name from [the list](api.md#tools) is that format",
    )
    adapter_tool_formats: list[AdapterToolFormat] = []
    reasoning_format: str = key(
        "auto",
        "what stands around the model's reasoning: `auto` finds it in the chat template, `none` "
        "leaves reasoning in the answer, a name from [the list](api.md#reasoning) is those tags",
    )
    embeddings: EmbeddingsSection = EmbeddingsSection()
    engine: EngineSection = EngineSection()
    replicas: ReplicasSection = ReplicasSection()

    @field_validator("reasoning_format")
    @classmethod
    def _known_tags(cls, value: str) -> str:
        return _known_format(value, THINK_TAGS)


class ConvertSection(Section):
    """Whether what clients load may be converted; ranges are those of ConversionOptions."""

    enabled: bool = key(
        False,
        "whether what clients load may hold other formats and methods, which are converted "
        "([how](adapters.md#other-formats-and-methods)); else it is refused",
        live=INGRESS,
    )
    rank: int | None = key(
        None,
        "the largest rank of a module",
        unset="64, or 256 if it is exact",
        ge=1,
        le=1024,
        live=INGRESS,
    )
    max_residual: float = key(
        0.05,
        "the part of a module's change that its factors may miss",
        ge=0.0,
        lt=1.0,
        live=INGRESS,
    )
    limit_s: float = key(
        300.0,
        "a conversion that takes longer is refused; one runs at a time",
        gt=0.0,
        live=INGRESS,
    )


class AdaptersSection(Section):
    root: str = key("file://.data/store", "the store: `file://folder` or `s3://bucket/prefix`")
    endpoint_url: str | None = key(
        None, "the address of another S3", unset="AWS", pattern=r"^https?://\S+$"
    )
    single_writer: bool = key(
        False,
        "`true` for an S3 server that does not keep one of two concurrent conditional writes: the "
        "server then writes nothing, and one shell at a time publishes "
        "([how](adapters.md#on-s3))",
    )
    plain_root: str | None = key(
        None,
        "`file://folder` or `s3://bucket/prefix` of plain PEFT folders, "
        "`<plain_root>/<name>/adapter_config.json`, which are served as they lie there "
        "([how](adapters.md#plain-folders))",
        unset="nowhere",
        pattern=r"^(file|s3)://\S+$",
    )
    disk_path: str = key(".data/adapters", "this machine's cache of the store")
    disk_bytes: Bytes = key(10 * 2**30, "the most that the cache may take")
    host_bytes: Bytes = key(
        2 * 2**30,
        "decoded adapters in memory: as many of those waited for as it holds, then idle ones; no "
        "copies of what stays on the device, while room is needed",
    )
    load_from: list[str] | None = key(
        None,
        "folders and `s3://bucket/prefix` below which clients may load adapters while the server "
        "runs ([how](vllm.md#adapters)); in mode `keys` those whose keys have `may_publish`",
        unset="nowhere",
        live=INGRESS,
    )
    convert: ConvertSection = ConvertSection()

    @field_validator("load_from")
    @classmethod
    def _has_places(cls, value: list[str] | None) -> list[str] | None:
        for place in value or ():
            if not place or ("://" in place and not place.startswith("s3://")):
                raise ValueError(f"{place!r} is neither a folder nor s3://bucket/prefix")
        return value


class TenancySection(Section):
    """Which clients may send requests, and how many.

    mode `open`: every client is the tenant `public`. Only on loopback, unless
    `allow_open_on_network` permits all clients that reach the port.
    mode `keys`: /v1 accepts only the keys in `keys_file` (`reef new-key`), and /metrics, which
    names tenants and adapters, only that file's `metrics_keys`, or every client with
    `metrics: open`. /health is always open.

    The limits count each tenant's requests to /v1 at all ingress replicas, even failed ones; the
    keys file may give a tenant its own limits. null is no limit.
    """

    mode: Literal["open", "keys"] = key(
        "open", "`open`: every client is the tenant `public`; `keys`: a request needs an API key"
    )
    allow_open_on_network: bool = key(
        False, "whether `open` may listen on an address that others can reach"
    )
    keys_file: str | None = key(
        None, "hashes of keys, whose they are, and tenants' limits; for mode `keys`", unset="none"
    )
    keys_in_store: bool = key(
        False,
        "whether the adapter store holds keys, too, made with `reef keys` or the admin API "
        "([how](tenants.md#keys-in-the-store)); for mode `keys`",
    )
    metrics: Literal["key", "open"] = key(
        "key", "`open` shows `/metrics` without a key in mode `keys`"
    )
    requests_per_minute: Limit = key(
        None, "requests of a tenant at all ingress replicas", unset="no limit", live=INGRESS
    )
    max_concurrent_requests: Limit = key(
        None,
        "answers of a tenant at a time, at all ingress replicas: a request counts its prompts "
        "times `n`",
        unset="no limit",
        live=INGRESS,
    )
    tokens_per_minute: Limit = key(
        None,
        "tokens of a tenant's prompts and answers; an answer is counted with `max_tokens` at "
        "first, and as what it was at its end",
        unset="no limit",
        live=INGRESS,
    )
    request_burst: Limit = key(
        None,
        "requests that a quiet tenant may send at once",
        unset="a whole minute's",
        live=INGRESS,
    )
    token_burst: Limit = key(
        None, "tokens that a quiet tenant may use at once", unset="a whole minute's", live=INGRESS
    )
    tokens_per_day: Limit = key(
        None, "tokens of a tenant in a day of UTC", unset="no limit", live=INGRESS
    )
    tokens_per_month: Limit = key(
        None, "tokens of a tenant in a month of UTC", unset="no limit", live=INGRESS
    )

    @property
    def limits(self) -> Limits:
        return Limits(**{field.name: getattr(self, field.name) for field in fields(Limits)})


class IngressSection(Section):
    replicas: int = key(
        1,
        "ingress replicas; where one dies its streams end, and the others serve on",
        ge=1,
    )
    num_cpus: float = key(0.0, "CPUs that Ray reserves for the ingress", ge=0)
    max_body_bytes: Bytes = key(
        8 * 2**20,
        "longer request bodies are a 413",
        live=INGRESS,
    )
    max_queued_requests: int = key(
        1024,
        "answers (a request's prompts times `n`) that may wait at an engine replica beyond "
        "`max_num_seqs`; more are a 429",
        ge=0,
        live=ENGINE,
    )
    max_wait_s: float | None = key(
        None,
        "a request whose first token is predicted later than this, by what waits at its replica "
        "and what that one's own steps have shown, is a 429",
        unset="it waits",
        gt=0,
        live=ENGINE,
    )
    hosts: list[str] | None = key(
        None,
        "names besides those of loopback that the Host header may have in mode `open`, such as "
        "that of a proxy on this machine",
        unset="none",
    )
    max_adapter_series: int = key(
        200,
        "adapters with labels of their own in `/metrics`: those with traffic in the last hour, as "
        "they came; all others share the label `other`",
        ge=0,
    )
    vllm_metrics: bool = key(
        True,
        "`/metrics` has [vLLM's names](vllm.md#metrics), too, which dashboards and gateways read",
    )
    cors_origins: list[str] | None = key(
        None,
        "a list of origins (`https://app.example`) whose pages may use the API from a browser; "
        "`*` is all",
        unset="none",
    )
    split_special_tokens: bool | None = key(
        None,
        "whether control tokens, such as `<eos>`, that are written in a chat's messages are "
        "encoded as text, so that they end no turn; prompts of completions always mean them",
        unset="true in mode `keys`",
        live=INGRESS,
    )
    lenient_schemas: bool = key(
        False,
        "`true` takes JSON schemas with keywords that cannot be enforced, and names these in the "
        "answer's header `x-reef-not-enforced`; otherwise they are a 400",
        live=INGRESS,
    )
    request_chat_templates: bool = key(
        False,
        "whether a chat may bring its own `chat_template`, which is rendered in a process with "
        "limits of time and memory; otherwise it is a 400",
        live=INGRESS,
    )
    keep_alive_s: float = key(
        15.0,
        "seconds without an event after which a stream gets a comment, so that nothing between "
        "takes it for dead; an error after the first comment is an event, not a status. 0 is never",
        ge=0,
        live=INGRESS,
    )


class AdminSection(Section):
    """The HTTP API that publishes and manages adapters, for the keys that the keys file names.

    The keys file may give a tenant its own limits.
    """

    enabled: bool = key(
        False,
        "whether `/admin/v1` publishes and manages adapters ([how](admin.md)), for the "
        "`publish_keys` and `admin_keys` of the keys file; needs mode `keys`",
    )
    max_upload_bytes: Bytes = key(2 * 2**30, "a longer upload is a 413")
    max_lora_rank: int = key(
        256, "an adapter with a module of a higher rank is refused", ge=1, le=1024
    )
    max_adapters: Limit = key(10_000, "live versions of one tenant, by this API; null is no limit")
    max_stored_bytes: Bytes | None = key(
        None, "bytes of one tenant's live versions together, by this API", unset="no limit"
    )
    publish_from: list[str] | None = key(
        None,
        "`s3://bucket/prefix` and `hf://organisation` or `hf://organisation/name` below which the "
        "server fetches adapters for these keys ([how](admin.md#from-other-places))",
        unset="nowhere",
    )

    @field_validator("publish_from")
    @classmethod
    def _has_prefixes(cls, value: list[str] | None) -> list[str] | None:
        for prefix in value or ():
            scheme, _, rest = prefix.partition("://")
            if scheme not in ("s3", "hf") or not rest.strip("/") or "@" in rest:
                raise ValueError(f"{prefix!r} is neither s3://bucket/prefix nor hf://organisation")
        return value


class PriceSection(Section):
    """What the requests of one price class cost. The first entry that fits a request is its."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$",
        description="the price class, which is written into the records of its requests",
    )
    models: list[str] | None = key(None, "the base models that it is for", unset="all")
    max_rank: int | None = key(
        None, "the largest rank of an adapter that it is for; the base has 0", unset="any", ge=0
    )
    prompt: Money = Field(description="of a million tokens of prompts")
    cached: Money | None = key(
        None, "of a million tokens of prompts that the KV cache held", unset="`prompt`"
    )
    output: Money = Field(description="of a million tokens of answers")
    load: Money = key(Decimal(0), "of a GiB of adapters that had to be loaded")


class UsageSection(Section):
    """Records of what each request used, for bills ([how](usage.md))."""

    path: str | None = key(
        None,
        "a folder on this machine's disk where a record of each request is kept until it is in "
        "`adapters.root`, below `usage/`",
        unset="no records",
    )
    fsync_s: float = key(
        1.0, "seconds after which a request's record is flushed to disk, at the latest", gt=0, le=60
    )
    upload_s: float = key(
        60.0, "seconds after which it is uploaded, at the latest", gt=0, le=86_400
    )
    max_bytes: Bytes = key(
        2**30,
        "the most that records may take on disk while the store cannot be reached; beyond that "
        "requests are served without a record, and counted",
    )
    currency: str = key("", "what prices are in; it is only written", max_length=16)
    prices: list[PriceSection] = []

    @field_validator("prices")
    @classmethod
    def _distinct(cls, value: list[PriceSection]) -> list[PriceSection]:
        names = [each.name for each in value]
        if len(set(names)) != len(names):
            raise ValueError(f"the names {names} are not distinct")
        return value


def explain(error: ErrorDetails, root: str, is_secret: bool = False) -> str:
    """Say what is wrong with a document, and where. A secret one's values are not repeated."""
    path = ".".join(map(str, error["loc"])) or root
    if error["type"] == "extra_forbidden":
        return f"{path}: unknown key"
    if error["type"] == "value_error" and isinstance(error["input"], dict):
        # A rule between keys, which its message names.
        return f"{path}: {error.get('ctx', {})['error']}"
    value = "" if is_secret else f", not {error['input']!r}"
    return f"{path}: {error['msg']}{value}"
