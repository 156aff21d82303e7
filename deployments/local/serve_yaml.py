"""Reads a Ray Serve config file for `reef serve`: its only application, and where to listen.

`serve run` reads the same file, and keys have the same meaning here. The application's `args` are
read by `deployments.config`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from deployments.live_settings import with_deployments
from deployments.strict_yaml import YamlMistake, read_yaml
from engine.config import ConfigError

DOCUMENT_KEYS = {"applications", "http_options"}
REQUIRED_KEYS = ("args", "import_path")
APPLICATION_KEYS = {"name", "import_path", "route_prefix", "args", "deployments"}
DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8000


@dataclass(frozen=True, slots=True)
class Address:
    """The host and port of the HTTP server."""

    host: str
    port: int

    @property
    def url(self) -> str:
        """URL for a client on this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"


def read_address(path: Path, host: str | None, port: int | None) -> Address:
    """Return the given address, else the file's http_options, else loopback. Raises ConfigError."""
    options = _as_mapping(_read_document(path).get("http_options", {}))
    if options is None or not set(options) <= {"host", "port"}:
        raise ConfigError(f"{path}: http_options must have no keys but host and port")
    given_host = options.get("host", DEFAULT_HOST) if host is None else host
    given_port = options.get("port", DEFAULT_PORT) if port is None else port
    if not isinstance(given_host, str) or type(given_port) is not int:
        raise ConfigError(f"{path}: http_options must be a host and a port, not {options}")
    return Address(given_host, given_port)


def read_application(path: Path) -> dict[str, Any]:
    """Return the only application of a Serve config file. Raises ConfigError."""
    applications = _read_document(path).get("applications")
    entries = cast(list[object], applications) if isinstance(applications, list) else []
    application = _as_mapping(entries[0]) if len(entries) == 1 else None
    if application is None:
        raise ConfigError(f"{path}: applications must be a list with one entry")
    unknown = sorted(map(str, set(application) - APPLICATION_KEYS))
    missing = next((f"no {key}" for key in REQUIRED_KEYS if key not in application), None)
    if unknown or missing:
        wanted = ", ".join(sorted(APPLICATION_KEYS))
        raise ConfigError(f"{path}: applications[0] has {unknown or missing}; keys: {wanted}")
    args = _as_mapping(application["args"])
    if "deployments" not in application or args is None:
        return application
    # Nothing changes here while the server runs: the settings are as good as args.
    entries = application.pop("deployments")
    return {**application, "args": with_deployments(args, entries)}


def _read_document(path: Path) -> dict[str, Any]:
    try:
        document = _as_mapping(read_yaml(path))
    except YamlMistake as error:
        raise ConfigError(f"{path}: {error}") from None
    unknown = {"no mapping"} if document is None else set(document) - DOCUMENT_KEYS
    if document is None or unknown:
        wanted = ", ".join(sorted(DOCUMENT_KEYS))
        raise ConfigError(f"{path} has {sorted(map(str, unknown))} at its top; keys: {wanted}")
    return document


def _as_mapping(value: object) -> dict[str, Any] | None:
    return cast(dict[str, Any], value) if isinstance(value, dict) else None
