"""AppConfig: the `args` of a configs/*.yaml, validated where they enter.

Unknown keys are refused at any depth, with their path. Byte sizes may be written `512MiB`.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from engine.config import ConfigError, EngineConfig

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "B": 1}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")


def parse_bytes(value: object) -> object:
    """`2GiB`, `1.5GB`, `4096` -> bytes; what is no string is left to the type's own check."""
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value.strip())
    if match is None or match[2] not in _UNITS:
        units = ", ".join(unit for unit in _UNITS if unit)
        raise ValueError(f"{value!r} is not a size in bytes: a number, then one of {units}")
    return int(float(match[1]) * _UNITS[match[2]])


Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(ge=0)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class EngineSection(Section):
    """See EngineConfig, which also checks the ranges."""

    device: str = "auto"
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    max_model_len: int | None = None
    block_size: int = 16
    memory_bytes: Bytes = 2 * 2**30
    adapter_memory_bytes: Bytes | None = None
    enable_prefix_caching: bool = True
    num_threads: int | None = None


class ReplicasSection(Section):
    """Several engine replicas behind one name are not supported yet."""

    min: int = Field(1, ge=1, le=1)
    max: int = Field(1, ge=1, le=1)
    num_cpus: float = Field(1, ge=0)
    num_gpus: float = Field(0, ge=0)


class ModelSection(Section):
    id: str = Field(pattern=r"^[^\s:@]{1,256}$")
    source: str
    dtype: str = "auto"
    quantization: str = "none"
    engine: EngineSection = EngineSection()
    replicas: ReplicasSection = ReplicasSection()


class AdaptersSection(Section):
    root: str = "file://.data/store"
    endpoint_url: None = None  # object stores other than a folder are not supported yet
    disk_path: str = ".data/adapters"
    disk_bytes: Bytes = 10 * 2**30
    host_bytes: Bytes = 2 * 2**30
    preload: list[str] = Field(default=[], max_length=0)  # not supported yet


class TenancySection(Section):
    mode: Literal["open"] = "open"  # everybody is the tenant `public`


class IngressSection(Section):
    num_cpus: float = Field(0, ge=0)
    max_body_bytes: Bytes = 8 * 2**20
    max_queued_requests: int = Field(1024, ge=0)  # beyond max_num_seqs; more are told to retry


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
    config = _absolute(config)
    for model in config.models:
        config.engine_config(model)  # EngineConfig checks its own ranges
    return config


def _explain(error: Any) -> str:
    path = ".".join(str(part) for part in error["loc"]) or "args"
    if error["type"] == "extra_forbidden":
        return f"{path}: unknown key"
    return f"{path}: {error['msg']}, not {error['input']!r}"


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
    return config.model_copy(
        update={"models": models, "adapters": adapters.model_copy(update=paths)}
    )
