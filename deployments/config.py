"""AppConfig: the `args` of a configs/*.yaml, validated where they enter.

Unknown keys are refused at any depth, with their path. Byte sizes may be written `512MiB`.
"""

from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from deployments.policy.admission import Limits
from engine.byte_size import parse_byte_size
from engine.config import ConfigError, EngineConfig


def parse_bytes(value: object) -> object:
    """Read a size that is written `2GiB`; what is no string is left to the type's own check."""
    return parse_byte_size(value) if isinstance(value, str) else value


Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(ge=0)]
Limit = Annotated[int, Field(ge=1)] | None


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class EngineSection(Section):
    """See EngineConfig, which also checks the ranges."""

    device: str = "auto"
    max_num_seqs: int = 64
    max_num_batched_tokens: int | None = None
    max_model_len: int | None = None
    block_size: int = 16
    memory_bytes: Bytes | None = None
    adapter_memory_bytes: Bytes | None = None
    enable_prefix_caching: bool = True
    kernels: str = "auto"
    cuda_graphs: str = "auto"
    flashinfer: str = "auto"
    lora_side_stream: bool = False
    num_threads: int | None = None
    activations: str = "bf16"
    kv_dtype: str = "auto"


class AutoscalingSection(Section):
    """How many replicas there are between `min` and `max`: as many as carry these targets each.

    The load is averaged over `look_back_s`; a decision stands for its delay before it is followed.
    """

    target_queued_tokens: float = Field(4096.0, gt=0)  # prompt tokens that wait to be computed
    target_kv_used: float = Field(0.8, gt=0, le=1)
    target_requests: float | None = Field(None, gt=0)  # None: the engine's max_num_seqs
    look_back_s: float = Field(5.0, gt=1.0, le=3600.0)
    upscale_delay_s: float = Field(5.0, ge=0)
    downscale_delay_s: float = Field(120.0, ge=0)


class ReplicasSection(Section):
    """Engine replicas behind one name. With min < max, their number follows the load."""

    min: int = Field(1, ge=1)
    max: int | None = Field(None, ge=1)  # None: min
    num_cpus: float = Field(1, ge=0)
    num_gpus: float = Field(0, ge=0)
    drain_s: float = Field(30.0, ge=0, le=3600)  # for a stopped replica's requests to finish
    surge_percent: int = Field(0, ge=0, le=100)  # new replicas before old ones are stopped
    autoscaling: AutoscalingSection = AutoscalingSection()

    @model_validator(mode="after")
    def _ordered(self) -> "ReplicasSection":
        if self.max is not None and self.max < self.min:
            raise ValueError(f"min={self.min} must be at most max={self.max}")
        return self

    @property
    def most(self) -> int:
        return self.min if self.max is None else self.max


class ModelSection(Section):
    id: str = Field(pattern=r"^[^\s:@]{1,256}$")
    source: str
    dtype: str = "auto"
    quantization: str = "none"
    engine: EngineSection = EngineSection()
    replicas: ReplicasSection = ReplicasSection()


class AdaptersSection(Section):
    root: str = "file://.data/store"
    endpoint_url: str | None = Field(None, pattern=r"^https?://\S+$")  # None: Amazon's own
    disk_path: str = ".data/adapters"
    disk_bytes: Bytes = 10 * 2**30
    host_bytes: Bytes = 2 * 2**30


class TenancySection(Section):
    """Who may ask, and how much.

    mode `open`: everybody is the tenant `public`. Only on loopback, unless
    `allow_open_on_network` says that everybody who reaches the port may.
    mode `keys`: /v1 answers to the keys in `keys_file` alone (`reef new-key`), and
    /metrics, which names tenants and adapters, to that file's `metrics_keys`, or to everybody
    with `metrics: open`. /health is always open.

    The limits count each tenant's requests to /v1 at each ingress replica, whatever comes of
    them; the keys file may give a tenant limits of its own. null is no limit.
    """

    mode: Literal["open", "keys"] = "open"
    allow_open_on_network: bool = False
    keys_file: str | None = None
    metrics: Literal["key", "open"] = "key"
    requests_per_minute: Limit = None  # a quiet tenant may use a whole minute's at once
    max_concurrent_requests: Limit = None

    @property
    def limits(self) -> Limits:
        return Limits(self.requests_per_minute, self.max_concurrent_requests)


class IngressSection(Section):
    num_cpus: float = Field(0, ge=0)
    max_body_bytes: Bytes = 8 * 2**20
    max_queued_requests: int = Field(1024, ge=0)  # beyond max_num_seqs; more are told to retry
    max_adapter_series: int = Field(200, ge=0)  # adapters with metrics of their own


class AppConfig(Section):
    models: list[ModelSection] = Field(min_length=1)
    adapters: AdaptersSection = AdaptersSection()
    tenancy: TenancySection = TenancySection()
    ingress: IngressSection = IngressSection()

    @model_validator(mode="after")
    def _distinct_ids(self) -> "AppConfig":
        ids = [model.id for model in self.models]
        if len(set(ids)) != len(ids):
            raise ValueError(f"models: the ids {ids} are not distinct")
        return self

    def engine_config(self, model: ModelSection) -> EngineConfig:
        return EngineConfig(
            source=model.source,
            dtype=model.dtype,
            quantization=model.quantization,
            host_adapter_bytes=self.adapters.host_bytes,
            **model.engine.model_dump(),
        )


def load_config(args: dict[str, Any]) -> AppConfig:
    """The one way in. ConfigError names every bad key with its path."""
    try:
        config = AppConfig.model_validate(args)
    except ValidationError as error:
        raise ConfigError("\n".join(map(_explain, error.errors()))) from None
    _check_tenancy(config.tenancy)
    _check_endpoint(config.adapters)
    config = _absolute(config)
    for model in config.models:
        config.engine_config(model)  # EngineConfig checks its own ranges
    return config


def _explain(error: Any) -> str:
    path = ".".join(str(part) for part in error["loc"]) or "args"
    if error["type"] == "extra_forbidden":
        return f"{path}: unknown key"
    if error["type"] == "value_error" and isinstance(error["input"], dict):
        return f"{path}: {error['ctx']['error']}"  # a rule between keys, which names them
    return f"{path}: {error['msg']}, not {error['input']!r}"


def _check_tenancy(tenancy: TenancySection) -> None:
    if tenancy.mode == "keys" and tenancy.keys_file is None:
        raise ConfigError("tenancy.keys_file: required where tenancy.mode is keys")
    if tenancy.mode == "open" and tenancy.keys_file is not None:
        raise ConfigError("tenancy.keys_file: given, but tenancy.mode is open: write mode: keys")


def _check_endpoint(adapters: AdaptersSection) -> None:
    if adapters.endpoint_url is not None and not adapters.root.startswith("s3://"):
        raise ConfigError(
            f"adapters.endpoint_url: only for a root that begins with s3://, not {adapters.root!r}"
        )


def check_exposure(tenancy: TenancySection, host: str | None) -> None:
    """Refuses to serve everybody on an address that others can reach. None: no address at all."""
    if host is None or is_loopback(host) or tenancy.mode == "keys":
        return
    if not tenancy.allow_open_on_network:
        raise ConfigError(
            f"tenancy.mode is open and HTTP listens on {host!r}, which others may reach: set "
            "tenancy.mode to keys, or tenancy.allow_open_on_network to true if everybody may use "
            "this server; or listen on 127.0.0.1 (http_options.host)"
        )


def is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _absolute(config: AppConfig) -> AppConfig:
    """Paths are relative to the working directory of whoever starts the application."""
    models = [
        model.model_copy(update={"source": str(Path(model.source).absolute())})
        for model in config.models
    ]
    adapters = config.adapters
    root = adapters.root
    if root.startswith("file://"):
        root = f"file://{Path(root.removeprefix('file://')).absolute()}"
    paths = {"root": root, "disk_path": str(Path(adapters.disk_path).absolute())}
    update: dict[str, Any] = {"models": models, "adapters": adapters.model_copy(update=paths)}
    if config.tenancy.keys_file is not None:
        keys_file = {"keys_file": str(Path(config.tenancy.keys_file).absolute())}
        update["tenancy"] = config.tenancy.model_copy(update=keys_file)
    return config.model_copy(update=update)
