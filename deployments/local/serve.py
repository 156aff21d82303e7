"""Implements `reef serve`: runs the application on a separate Ray cluster on loopback.

All processes that it starts are descendants of this one and end with it.
"""

# Ray's own types are incomplete.
# pyright: reportUnknownMemberType=false

import importlib
import json
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from deployments.config import (
    AppConfig,
    check_exposure,
    load_config,
    open_adapter_store,
    shared_namespaces,
)
from deployments.installation import checkout_root
from deployments.local.lean_ray import start_forks
from deployments.local.ray_head import cluster, cluster_folder, end_on_signals, prepare_ray
from deployments.local.serve_yaml import Address, read_address, read_application
from deployments.tenants.tenants import open_tenants
from engine.config import ConfigError

DEMO = Path(".data/demo")
DEMO_TENANT = "public"
READY_TIMEOUT_S = 600.0

_OUR_ERROR = re.compile(r"^(?:adapter_store|deployments|engine)\.[\w.]+: ", re.MULTILINE)


class ServerStartFailed(Exception):
    """A deployment could not start; the message says why."""


def serve_locally(config: Path, host: str | None = None, port: int | None = None) -> None:
    """Serve until SIGINT or SIGTERM.

    Raises WrongInstallation, ConfigError, AdapterStoreError, OSError or ServerStartFailed.
    """
    end_on_signals()
    with suppress(KeyboardInterrupt):
        _serve(config, read_address(config, host, port))


def _serve(path: Path, address: Address) -> None:
    started_s = time.monotonic()
    application = read_application(path)
    config = load_config(application["args"])
    check_exposure(config.tenancy, address.host)
    _refuse_busy_port(address)
    # Checked here, where a mistake is one sentence instead of three attempts to start.
    open_tenants(config.tenancy, shared=shared_namespaces(config.adapters))
    open_adapter_store(config.adapters)
    has_demo = _serves_demo(config)
    if has_demo:
        _make_demo()
    with cluster_folder() as folder, ThreadPoolExecutor(1) as executor:
        prepare_ray(folder)
        start_forks(folder)  # before there are threads
        # Runs while Ray starts.
        published = executor.submit(_publish_demo, config) if has_demo else None
        with cluster(folder, address):
            if published is not None:
                published.result()
            _run(application)
            _wait_until_healthy(address)
            _announce(config, address, time.monotonic() - started_s)
            signal.pause()


def _refuse_busy_port(address: Address) -> None:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address.host, address.port))
        except (OSError, OverflowError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            where = f"port {address.port} of {address.host}"
            raise OSError(f"{where} cannot be used: {reason}; choose another port") from None


# ---- the demo ------------------------------------------------------------------------------


def _serves_demo(config: AppConfig) -> bool:
    return any(Path(model.source) == (DEMO / "base").absolute() for model in config.models)


def _make_demo() -> None:
    """Make the demo on first use, in a separate process, so that training loads nothing here."""
    if (DEMO / "report.json").exists():
        return
    root = checkout_root("examples/demo")
    print("Making the demo model and its adapters: a few minutes, once.", flush=True)
    command = [sys.executable, "-m", "examples.demo.make", str(DEMO.absolute())]
    made = subprocess.run(command, cwd=root, check=False)
    if made.returncode != 0:
        raise OSError(f"the demo could not be made: exit status {made.returncode}")


def _publish_demo(config: AppConfig) -> None:
    """Publish the demo's adapters; those that are already published stay as they are."""
    store = open_adapter_store(config.adapters)
    fingerprint = store.register_base(DEMO / "base")
    for folder in sorted((DEMO / "adapters").iterdir()):
        store.publish(folder, DEMO_TENANT, folder.name, fingerprint)


def _run(application: dict[str, Any]) -> None:
    from ray import serve

    build = _builder(str(application["import_path"]))
    name = application.get("name", "default")
    graph = build(application["args"])
    try:
        serve.run(graph, name=name, route_prefix=application.get("route_prefix", "/"))
    except RuntimeError as error:
        deployments = serve.status().applications[name].deployments.values()
        reasons = dict.fromkeys(reason(d.message) for d in deployments if d.message)
        raise ServerStartFailed("\n".join(reasons) or str(error)) from None


def _builder(import_path: str) -> Callable[[Any], Any]:
    """Import the function that `module:name` refers to. Raises ConfigError."""
    module, _, name = import_path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"import_path {import_path!r}: {error}") from None


def reason(message: str) -> str:
    """Extract our error message from Ray's; fall back to the whole text."""
    ours = list(_OUR_ERROR.finditer(message))
    return message[ours[-1].end() :].strip() if ours else message


# ---- messages on the terminal --------------------------------------------------------------


def _wait_until_healthy(address: Address) -> None:
    """Wait until every model can answer."""
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline_s:
        if _health_status(address) == "ok":
            return
        time.sleep(0.1)
    raise OSError(f"the server did not become healthy within {READY_TIMEOUT_S:.0f} s")


def _health_status(address: Address) -> str:
    try:
        with urllib.request.urlopen(f"{address.url}/health", timeout=5) as answer:
            return json.load(answer)["status"]
    except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
        return str(error)


def _announce(config: AppConfig, address: Address, took_s: float) -> None:
    url, key = address.url, ""
    if config.tenancy.mode == "keys":
        key = ' -H "Authorization: Bearer $REEF_KEY"'
    model, prompt = _example(config)
    message = {"role": "user", "content": prompt}
    body = json.dumps({"model": model, "messages": [message], "max_tokens": 64, "temperature": 0})
    print(
        f"\nServing on {url} after {took_s:.1f} s. Ctrl-C ends it. Try:\n\n"
        f"curl -s {url}/v1/models{key}\n\n"
        f"curl -s {url}/v1/chat/completions{key} -H 'Content-Type: application/json' \\\n"
        f"  -d {shlex.quote(body)}\n",
        flush=True,
    )


def _example(config: AppConfig) -> tuple[str, str]:
    """Return a model and a prompt to try: a held-out one of the demo, if it is served."""
    if not _serves_demo(config):
        return config.models[0].id, "Hello!"
    held_out = json.loads((DEMO / "heldout.json").read_text())
    name = next(iter(held_out))
    return name, held_out[name][0]["prompt"]
