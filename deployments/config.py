"""AppConfig: the `args` of a configs/*.yaml, validated when they are loaded.

Unknown keys are refused at any depth, with their path. The keys are in `config_sections`.
"""

import os
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from adapter_store.open_store import endpoint_from
from adapter_store.plain_origin import PLAIN_NAMESPACE
from adapter_store.store import AdapterStore
from deployments.config_sections import (
    AdaptersSection,
    AdminSection,
    EngineSection,
    IngressSection,
    ModelSection,
    Section,
    TenancySection,
    UsageSection,
    explain,
)
from deployments.policy.backlog import QueueLimits
from engine.config import ConfigError, EngineConfig, SpeculationConfig


class AppConfig(Section):
    models: list[ModelSection] = Field(min_length=1)
    adapters: AdaptersSection = AdaptersSection()
    tenancy: TenancySection = TenancySection()
    ingress: IngressSection = IngressSection()
    admin: AdminSection = AdminSection()
    usage: UsageSection = UsageSection()

    @model_validator(mode="after")
    def _distinct_ids(self) -> "AppConfig":
        ids = [model.id for model in self.models]
        if len(set(ids)) != len(ids):
            raise ValueError(f"models: the ids {ids} are not distinct")
        return self

    def max_answers(self, model: ModelSection) -> int:
        """Count what one engine replica may run and queue: each choice of each prompt."""
        return model.engine.max_num_seqs + self.ingress.max_queued_requests

    def queue_limits(self, model: ModelSection) -> QueueLimits:
        return QueueLimits(self.max_answers(model), self.ingress.max_wait_s)

    @property
    def browser_hosts(self) -> list[str] | None:
        """The hosts by which a local browser may ask. None where it may ask by any.

        That is where a key is asked for, or where everybody on the network may ask.
        """
        if self.tenancy.mode == "keys" or self.tenancy.allow_open_on_network:
            return None
        return self.ingress.hosts or []

    def engine_config(self, model: ModelSection) -> EngineConfig:
        engine = model.engine.model_dump()
        speculation = SpeculationConfig(**engine.pop("speculation"))
        return EngineConfig(
            source=model.source,
            dtype=model.dtype,
            quantization=model.quantization,
            generation_config=model.generation_config,
            host_adapter_bytes=self.adapters.host_bytes,
            speculation=speculation,
            **engine,
        )


def load_config(args: dict[str, Any]) -> AppConfig:
    """Make an AppConfig; use no other way. Raises ConfigError, which names each bad key's path."""
    try:
        config = AppConfig.model_validate(args)
    except ValidationError as error:
        raise ConfigError("\n".join(explain(each, "args") for each in error.errors())) from None
    _check_tenancy(config.tenancy)
    if config.admin.enabled and config.tenancy.mode != "keys":
        raise ConfigError("admin.enabled: only where tenancy.mode is keys, since it needs keys")
    _check_endpoint(config.adapters)
    _check_writers(config)
    _check_usage(config)
    config = _settled(_absolute(config))
    for model in config.models:
        config.engine_config(model)  # EngineConfig checks its own ranges
    return config


def _check_tenancy(tenancy: TenancySection) -> None:
    if tenancy.mode == "keys" and tenancy.keys_file is None and not tenancy.keys_in_store:
        raise ConfigError(
            "tenancy.keys_file: required where tenancy.mode is keys, unless tenancy.keys_in_store "
            "is true"
        )
    if tenancy.mode == "open" and tenancy.keys_in_store:
        raise ConfigError("tenancy.keys_in_store: true, but tenancy.mode is open: write mode: keys")
    if tenancy.mode == "open" and tenancy.keys_file is not None:
        raise ConfigError("tenancy.keys_file: given, but tenancy.mode is open: write mode: keys")


def _check_writers(config: AppConfig) -> None:
    if not config.adapters.single_writer:
        return
    if config.admin.enabled or config.adapters.load_from:
        key = "admin.enabled" if config.admin.enabled else "adapters.load_from"
        raise ConfigError(
            f"{key}: not where adapters.single_writer is true, since several ingresses and engines "
            "would write"
        )


def _check_usage(config: AppConfig) -> None:
    """Refuse prices that no request can have, and what nothing could be uploaded with."""
    usage, ids = config.usage, {model.id for model in config.models}
    for at, price in enumerate(usage.prices):
        if unknown := sorted(set(price.models or ()) - ids):
            raise ConfigError(f"usage.prices.{at}.models: {unknown} are not among the models {ids}")
    if usage.path is not None and config.adapters.single_writer:
        raise ConfigError(
            "usage.path: not where adapters.single_writer is true, since the server would write "
            "records to that store"
        )


def _check_endpoint(adapters: AdaptersSection) -> None:
    if adapters.endpoint_url is not None and not adapters.root.startswith("s3://"):
        raise ConfigError(
            f"adapters.endpoint_url: only for a root that begins with s3://, not {adapters.root!r}"
        )


def check_exposure(tenancy: TenancySection, host: str | None) -> None:
    """Refuse to serve without keys on an address that others can reach. None: no address."""
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


def _settled(config: AppConfig) -> AppConfig:
    """Fill in the defaults that follow from other keys."""
    if config.ingress.split_special_tokens is not None:
        return config
    split = {"split_special_tokens": config.tenancy.mode == "keys"}
    return config.model_copy(update={"ingress": config.ingress.model_copy(update=split)})


def _absolute_draft(engine: EngineSection) -> EngineSection:
    speculation = engine.speculation
    if speculation.model is None:
        return engine
    path = {"model": str(Path(speculation.model).absolute())}
    return engine.model_copy(update={"speculation": speculation.model_copy(update=path)})


def _absolute(config: AppConfig) -> AppConfig:
    """Resolve paths, which are relative to the working directory of the starting process."""
    models = [
        model.model_copy(
            update={
                "source": str(Path(model.source).absolute()),
                "engine": _absolute_draft(model.engine),
            }
        )
        for model in config.models
    ]
    adapters = config.adapters
    paths: dict[str, Any] = {
        "root": _absolute_root(adapters.root),
        "disk_path": str(Path(adapters.disk_path).absolute()),
    }
    if adapters.plain_root is not None:
        paths["plain_root"] = _absolute_root(adapters.plain_root)
    if adapters.load_from is not None:
        places = adapters.load_from
        paths["load_from"] = [p if "://" in p else str(Path(p).absolute()) for p in places]
    update: dict[str, Any] = {"models": models, "adapters": adapters.model_copy(update=paths)}
    if config.usage.path is not None:
        folder = {"path": str(Path(config.usage.path).absolute())}
        update["usage"] = config.usage.model_copy(update=folder)
    if config.tenancy.keys_file is not None:
        keys_file = {"keys_file": str(Path(config.tenancy.keys_file).absolute())}
        update["tenancy"] = config.tenancy.model_copy(update=keys_file)
    return config.model_copy(update=update)


def _absolute_root(root: str) -> str:
    if not root.startswith("file://"):
        return root
    return f"file://{Path(root.removeprefix('file://')).absolute()}"


def open_adapter_store(adapters: AdaptersSection) -> AdapterStore:
    """Open the store that the configuration names. Raises AdapterStoreError."""
    return AdapterStore(
        adapters.root,
        Path(adapters.disk_path),
        adapters.disk_bytes,
        endpoint_url=endpoint_of(adapters, adapters.root),
        may_write=not adapters.single_writer,
        plain_root=adapters.plain_root,
        plain_endpoint_url=endpoint_of(adapters, adapters.plain_root or ""),
    )


def shared_namespaces(adapters: AdaptersSection) -> tuple[str, ...]:
    """List the namespaces that are open to all tenants, beside `public`."""
    return () if adapters.plain_root is None else (PLAIN_NAMESPACE,)


def endpoint_of(adapters: AdaptersSection, root: str = "s3://") -> str | None:
    """Return the address of S3 for a root, if it is on S3; None is AWS's."""
    if not root.startswith("s3://"):
        return None
    return adapters.endpoint_url or endpoint_from(os.environ, root)
