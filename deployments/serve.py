"""What `make serve` runs: a Ray cluster of its own on loopback, the application, and the way out.

    python -m deployments.serve [--config configs/dev-cpu.yaml] [--host 127.0.0.1] [--port 8000]

Everything it starts is a descendant of this process and ends with it. Nothing is shared with
another cluster on the machine: ports, folders and the token are its own.
"""

import argparse
import importlib
import json
import logging
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from adapter_store.errors import AdapterStoreError
from deployments.config import AppConfig, check_exposure, load_config
from deployments.config_file import Address, read_address, read_application
from deployments.stores import open_adapter_store
from deployments.tenants import open_tenants
from engine.config import ConfigError

DEMO = Path(".data/demo")
DEMO_TENANT = "public"
READY_TIMEOUT_S = 600.0
KILL_TIMEOUT_S = 5.0
OBJECT_STORE_BYTES = 100 * 2**20

_OUR_ERROR = re.compile(r"^(?:adapter_store|deployments|engine)\.[\w.]+: ", re.MULTILINE)


class StartFailed(Exception):
    """A deployment could not start; the message is why."""


def main() -> int:
    options = _parse_arguments()
    _end_on_signals()
    try:
        _serve(options.config, read_address(options.config, options.host, options.port))
    except KeyboardInterrupt:
        return 0
    except (AdapterStoreError, ConfigError, OSError, StartFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _end_on_signals() -> None:
    """One way out for both. SIGINT too: a shell that starts us in the background ignores it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Serve a configuration.")
    parser.add_argument("--config", type=Path, default=Path("configs/dev-cpu.yaml"))
    parser.add_argument("--host", help="the address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, help="(default: 8000)")
    return parser.parse_args()


def _serve(path: Path, address: Address) -> None:
    started_s = time.monotonic()
    application = read_application(path)
    config = load_config(application["args"])
    check_exposure(config.tenancy, address.host)
    _refuse_busy_port(address)
    # Here already, where what is wrong is one sentence and not three attempts to start.
    open_tenants(config.tenancy)
    open_adapter_store(config.adapters)
    has_demo = _serves_demo(config)
    if has_demo:
        _make_demo()
    with _folder() as folder, ThreadPoolExecutor(1) as executor:
        os.environ.update(ray_environment(folder))
        # While Ray starts.
        published = executor.submit(_publish_demo, config) if has_demo else None
        with _cluster(folder, address):
            if published is not None:
                published.result()
            _run(application)
            _wait_until_healthy(address)
            _announce(config, address, time.monotonic() - started_s)
            signal.pause()


def ray_environment(folder: Path) -> dict[str, str]:
    """What Ray reads from the environment when it is imported, here and in all its processes."""
    haproxy = folder / "haproxy"
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(haproxy / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(haproxy / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(haproxy),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(haproxy / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        # Its default is one port, which two clusters would share without noticing.
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
        # Ray's own work while nothing happens; ten times a second is for clusters of hundreds.
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.25",
        "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "1000",
        # Ray runs its workers at 15, where two busy threads may stay on one core for seconds.
        "RAY_worker_niceness": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DISABLE_IMPORT_WARNING": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _refuse_busy_port(address: Address) -> None:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address.host, address.port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            where = f"port {address.port} of {address.host}"
            raise OSError(f"{where} cannot be used: {reason}; try PORT=n") from None


# ---- the demo ------------------------------------------------------------------------------


def _serves_demo(config: AppConfig) -> bool:
    return any(Path(model.source) == (DEMO / "base").absolute() for model in config.models)


def _make_demo() -> None:
    """On first use; in a process of its own, because it trains and this one must stay light."""
    if (DEMO / "report.json").exists():
        return
    print("Making the demo model and its adapters: a few minutes, once.", flush=True)
    made = subprocess.run([sys.executable, "-m", "examples.demo.make", str(DEMO)], check=False)
    if made.returncode != 0:
        raise OSError(f"the demo could not be made: exit status {made.returncode}")


def _publish_demo(config: AppConfig) -> None:
    """What is published already stays as it is."""
    store = open_adapter_store(config.adapters)
    fingerprint = store.register_base(DEMO / "base")
    for folder in sorted((DEMO / "adapters").iterdir()):
        store.publish(folder, DEMO_TENANT, folder.name, fingerprint)


# ---- Ray -----------------------------------------------------------------------------------


@contextmanager
def _folder() -> Iterator[Path]:
    # Not below the repository: Ray's sockets must have short paths.
    folder = Path(tempfile.mkdtemp(prefix="reef-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _cluster(folder: Path, address: Address) -> Iterator[None]:
    """A head in this process' care. At the end all of its processes are gone."""
    import ray
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        ray.init(
            address="local",
            num_cpus=max(2, os.cpu_count() or 1),
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            _temp_dir=str(folder / "ray"),
            _node_ip_address="127.0.0.1",
            log_to_driver=False,
            logging_level="warning",
        )
        _end_on_signals()  # Ray has a handler of its own for SIGTERM
        http_options = {"host": address.host, "port": address.port}
        serve.start(http_options=http_options, logging_config=None)
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # the way out is taken once, and to its end
        family = descendants(os.getpid())
        with suppress(Exception):
            ray.shutdown()
        _kill(family)


def _kill(pids: list[int]) -> None:
    """Whatever of these is left, and waits until it is gone."""
    for pid in reversed(pids):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    deadline_s = time.monotonic() + KILL_TIMEOUT_S
    while any(map(_is_running, pids)) and time.monotonic() < deadline_s:
        time.sleep(0.02)


def _is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"  # ended, and only waiting for its parent to notice


def _run(application: dict[str, Any]) -> None:
    from ray import serve

    module, _, name = application["import_path"].partition(":")
    build = getattr(importlib.import_module(module), name)
    name = application.get("name", "default")
    graph = build(application["args"])
    try:
        serve.run(graph, name=name, route_prefix=application.get("route_prefix", "/"))
    except RuntimeError as error:
        deployments = serve.status().applications[name].deployments.values()
        reasons = dict.fromkeys(reason(d.message) for d in deployments if d.message)
        raise StartFailed("\n".join(reasons) or str(error)) from None


def reason(message: str) -> str:
    """Of what Ray says about a deployment that failed, our own words; all of it if it has none."""
    ours = list(_OUR_ERROR.finditer(message))
    return message[ours[-1].end() :].strip() if ours else message


def descendants(root: int) -> list[int]:
    """Process ids below `root`, parents first."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                # pid (name) state ppid ...; the name may hold anything.
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found: list[int] = []
    queue = [root]
    while queue:
        below = children.get(queue.pop(0), [])
        found += below
        queue += below
    return found


# ---- for the person at the terminal --------------------------------------------------------


def _wait_until_healthy(address: Address) -> None:
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline_s:
        try:
            urllib.request.urlopen(f"{address.url}/health", timeout=5).close()
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.1)
        else:
            return
    raise OSError(f"the server did not become healthy within {READY_TIMEOUT_S:.0f} s")


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
    """A model and a prompt worth trying: one that no adapter of the demo has seen, if it runs."""
    if not _serves_demo(config):
        return config.models[0].id, "Hello!"
    held_out = json.loads((DEMO / "heldout.json").read_text())
    name = next(iter(held_out))
    return name, held_out[name][0]["prompt"]


if __name__ == "__main__":
    sys.exit(main())
