"""Settings that change while the server runs: Ray Serve's `user_config` of a deployment.

A change of an application's `args` starts every replica anew; one of a deployment's `user_config`
is handed to the replicas that run. What stands in it replaces the same keys of `args`; for an
Engine deployment those of its model are written without `models[]`. Only keys that are marked as
live are taken.
"""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from deployments.config import AppConfig, load_config
from deployments.config_sections import ENGINE, INGRESS
from deployments.config_table import config_keys
from engine.config import ConfigError

OF_MODEL = "models[]."

logger = logging.getLogger(__name__)

_ENGINES = re.compile(rf"{ENGINE}(?:-([1-9][0-9]*))?")


def live_keys(kind: str) -> dict[str, str]:
    """Map the live keys of a kind of deployment to their paths in `args`."""
    found = [path for path, field in config_keys(AppConfig) if _live(field) == kind]
    return {path.removeprefix(OF_MODEL): path for path in found}


def _live(field: Any) -> object:
    extra = field.json_schema_extra
    return cast(dict[str, object], extra).get("live") if isinstance(extra, dict) else None


def engine_name(number: int) -> str:
    """Name the Engine deployment of a model by its place in the configuration."""
    return f"{ENGINE}-{number}" if number else ENGINE


def configured(config: AppConfig, deployment: str, user_config: object) -> AppConfig:
    """Return the configuration with a deployment's `user_config`. Raises ConfigError."""
    if user_config is None:
        return config
    overlay = overlaid(config.model_dump(), deployment, user_config)
    for place in overlay["adapters"]["load_from"] or ():
        if "://" not in str(place) and not Path(str(place)).is_absolute():
            raise ConfigError(
                f"user_config of {deployment}: adapters.load_from: {place!r} is no absolute path; "
                "replicas have working directories of their own"
            )
    return load_config(overlay)


def reconfigured(
    config: AppConfig, deployment: str, user_config: object, is_running: bool
) -> AppConfig | None:
    """Return the configuration for a replica's `reconfigure`; None if it keeps what it has.

    A mistake is refused at the start (ConfigError). Later Ray would replace a replica that raises,
    by one that cannot start: so the mistake is logged, and what holds stays.
    """
    try:
        changed = configured(config, deployment, user_config)
    except ConfigError as error:
        if not is_running:
            raise
        logger.error("the settings stay as they were: %s", error)
        return None
    if is_running:
        logger.info("settings have changed: user_config is %s", user_config)
    return changed


def with_deployments(args: Mapping[str, Any], entries: object) -> dict[str, Any]:
    """Return the args with what a config file's `deployments` say. Raises ConfigError."""
    overlay = dict(args)
    for entry in cast(list[object], entries) if isinstance(entries, list) else [entries]:
        known = cast(dict[str, Any], entry) if isinstance(entry, dict) else {}
        if set(known) != {"name", "user_config"}:
            raise ConfigError(
                "deployments: each entry has a name and a user_config here, and nothing else"
            )
        overlay = overlaid(overlay, str(known["name"]), known["user_config"])
    return overlay


def overlaid(args: Mapping[str, Any], deployment: str, user_config: object) -> dict[str, Any]:
    """Return the args with a deployment's `user_config` in place of the same keys.

    Raises ConfigError if it has others than those that are live there.
    """
    match = _ENGINES.fullmatch(deployment)
    kind = ENGINE if match else deployment
    live = live_keys(kind)
    if kind not in (INGRESS, ENGINE):
        raise ConfigError(f"deployments: {deployment!r} is neither {INGRESS} nor {ENGINE}")
    if not isinstance(user_config, dict):
        raise ConfigError(f"user_config of {deployment} must have keys, not be {user_config!r}")
    result = dict(args)
    for path, value in _leaves(cast(dict[str, Any], user_config), live):
        if path not in live:
            raise ConfigError(
                f"user_config of {deployment}: {path} is not a key that changes without a restart; "
                f"these are: {', '.join(live)}"
            )
        keys = live[path].split(".")
        if live[path].startswith(OF_MODEL):
            number = int(match[1] or 0) if match else 0
            result["models"] = _with_model(result, number, keys[1:], value, deployment)
        else:
            result = _set(result, keys, value)
    return result


def _leaves(
    document: Mapping[str, Any], live: Mapping[str, str], path: str = ""
) -> Iterator[tuple[str, Any]]:
    """Walk down to the live keys, or to what is none."""
    for name, value in document.items():
        at = f"{path}{name}"
        if at not in live and isinstance(value, dict):
            yield from _leaves(cast(dict[str, Any], value), live, f"{at}.")
        else:
            yield at, value


def _with_model(
    result: Mapping[str, Any],
    number: int,
    keys: Sequence[str],
    value: object,
    deployment: str,
) -> list[Any]:
    models = list(cast(list[Any], result.get("models") or []))
    if number >= len(models):
        raise ConfigError(f"user_config of {deployment}: there are only {len(models)} models")
    models[number] = _set(models[number], keys, value)
    return models


def _set(document: Mapping[str, Any], keys: Sequence[str], value: object) -> dict[str, Any]:
    """Return a copy with one value replaced, however deep."""
    if len(keys) == 1:
        return {**document, keys[0]: value}
    return {**document, keys[0]: _set(document.get(keys[0]) or {}, keys[1:], value)}
