"""Runs a separate Ray cluster: a head on loopback whose processes all end with this one.

It shares neither ports nor folders nor its token with other clusters on the machine.
"""

# Ray's own types are incomplete.
# pyright: reportUnknownMemberType=false, reportArgumentType=false

import logging
import os
import random
import secrets
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from deployments.haproxy_launcher import BINARY_VARIABLE, write_launcher
from deployments.local.lean_ray import lean_ray
from deployments.local.serve_yaml import Address

KILL_TIMEOUT_S = 5.0
QUIET_PORTS = range(20_000, 30_000)  # Ray uses ports below, and above for replicas' HTTP
OBJECT_STORE_BYTES = 100 * 2**20
HARD_STOP_AFTER_S = 660


def prepare_ray(folder: Path) -> None:
    """Set all that Ray is to find, before it is imported."""
    environment = ray_environment(folder)
    write_launcher(Path(environment[BINARY_VARIABLE]))
    os.environ.update(environment)


def ray_environment(folder: Path) -> dict[str, str]:
    """Return the variables that Ray reads when it is imported, here and in all its processes."""
    haproxy = folder / "haproxy"
    return {
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(haproxy / "launcher"),
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
        # Not read by anything; the default is the port of the machine's syslog, and needs a socket.
        "RAY_SERVE_HAPROXY_LOG_TARGET": str(haproxy / "log.sock"),
        # Longer than a stopping ingress may take to finish its responses.
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(HARD_STOP_AFTER_S),
        # The default is a fixed port, which two clusters would silently share.
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
        # Ray's own work while idle; the default, ten times a second, suits clusters of hundreds.
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.25",
        "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "10000",
        # Nobody asks for Ray's own figures and events: Reef has its own, and there is no dashboard.
        "RAY_enable_metrics_collection": "0",
        "RAY_task_events_report_interval_ms": "0",
        # What the raylet looks at ten times a second: objects, disk, memory and spare workers. None
        # of it changes here.
        "RAY_object_manager_timer_freq_ms": "1000",
        "RAY_local_fs_monitor_interval_ms": "5000",
        "RAY_raylet_check_gc_period_milliseconds": "1000",
        "RAY_kill_idle_workers_interval_ms": "1000",
        # Ray's default is 15, at which two busy threads may stay on one core for seconds.
        "RAY_worker_niceness": "0",
        # Otherwise Ray replaces 127.0.0.1 by the machine's address, and listens on all interfaces.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        # Off: it would kill all workers because of the memory of the engine's process.
        "RAY_memory_monitor_refresh_ms": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }


def free_port() -> int:
    """Return a free port between the ranges that Ray and the kernel assign from.

    One from the kernel's range might be taken again before it is used. Raises OSError.
    """
    for port in random.SystemRandom().sample(QUIET_PORTS, len(QUIET_PORTS)):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
    raise OSError(f"every port from {QUIET_PORTS[0]} to {QUIET_PORTS[-1]} is taken")


def end_on_signals() -> None:
    """Make both signals raise KeyboardInterrupt; a shell's background jobs ignore SIGINT."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)


@contextmanager
def cluster_folder() -> Generator[Path]:
    # Not in the repository: paths of Ray's sockets must be short.
    folder = Path(tempfile.mkdtemp(prefix="reef-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def cluster(folder: Path, address: Address) -> Generator[None]:
    """Start a head; on exit, end all of its processes."""
    import ray
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        with lean_ray():
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
        end_on_signals()  # Ray installs its own handler for SIGTERM
        http_options = {"host": address.host, "port": address.port}
        serve.start(http_options=http_options, logging_config=None)
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # ignore further signals: shutdown must complete
        family = psutil.Process().children(recursive=True)
        with suppress(Exception):
            ray.shutdown()
        _kill(family)


def _kill(processes: list[psutil.Process]) -> None:
    """Kill the remaining processes, children first, and wait until they have ended."""
    for process in reversed(processes):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    deadline_s = time.monotonic() + KILL_TIMEOUT_S
    while any(map(_is_running, processes)) and time.monotonic() < deadline_s:
        time.sleep(0.02)


def _is_running(process: psutil.Process) -> bool:
    """Check if a process runs; a zombie has ended and is only not yet reaped by its parent."""
    with suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False
