"""Who may be served where: what a configuration may say, and what a server does when it may not."""

import logging
import logging.handlers
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments import serve_logging as logs
from deployments.config import TenancySection, check_exposure, is_loopback, load_config
from deployments.local.serve import reason
from deployments.local.serve_yaml import Address, read_address
from deployments.policy.admission import Limits
from deployments.stores import open_adapter_store
from engine.config import ConfigError

MODEL: dict[str, Any] = {"id": "demo", "source": "somewhere"}
KEYS = {"mode": "keys", "keys_file": "keys.yaml"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"tenancy": {"mode": "closed"}}, "tenancy.mode"),
        ({"tenancy": {"mode": "keys"}}, "tenancy.keys_file: required"),
        ({"tenancy": {"keys_file": "keys.yaml"}}, "tenancy.keys_file: given, but"),
        ({"tenancy": {**KEYS, "api_key": "x"}}, "tenancy.api_key: unknown key"),
        ({"tenancy": {**KEYS, "metrics": "closed"}}, "tenancy.metrics"),
        ({"tenancy": {"requests_per_minute": 0}}, "tenancy.requests_per_minute"),
        ({"tenancy": {"requests_per_minute": 1.5}}, "tenancy.requests_per_minute"),
        ({"tenancy": {"max_concurrent_requests": -1}}, "tenancy.max_concurrent_requests"),
        ({"adapters": {"endpoint_url": "http://127.0.0.1:9"}}, "adapters.endpoint_url: only for"),
        ({"adapters": {"root": "s3://b/p", "endpoint_url": "127.0.0.1:9"}}, "endpoint_url"),
        ({"models": [MODEL, {**MODEL, "source": "elsewhere"}]}, "distinct"),
    ],
)
def test_a_bad_setting_is_refused_with_its_path(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({"models": [MODEL], **args})
    assert message in str(caught.value)


def test_limits_and_an_absolute_keys_file_come_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tenancy = {**KEYS, "requests_per_minute": 60, "max_concurrent_requests": 4}
    config = load_config({"models": [MODEL], "tenancy": tenancy})
    assert config.tenancy.limits == Limits(60, 4)
    assert config.tenancy.keys_file == str(tmp_path / "keys.yaml")
    assert load_config({"models": [MODEL]}).tenancy.limits == Limits()


def test_the_endpoint_of_a_configuration_is_the_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    monkeypatch.setattr(
        "deployments.stores.AdapterStore", lambda *args, **more: opened.append((args, more))
    )
    where = {"root": "s3://bucket/prefix", "endpoint_url": "http://127.0.0.1:9000"}
    open_adapter_store(load_config({"models": [MODEL], "adapters": where}).adapters)
    (arguments, more) = opened[0]
    assert arguments[0] == "s3://bucket/prefix"
    assert more == {"endpoint_url": "http://127.0.0.1:9000"}


# ---- where a server listens ----------------------------------------------------------------

OPEN = TenancySection()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "localhost", "::1", None])
def test_everybody_may_be_served_on_loopback(host: str | None) -> None:
    assert host is None or is_loopback(host)
    check_exposure(OPEN, host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "reef.example", "127.0.0.1.nip.io"])
def test_everybody_is_not_served_on_a_network_unless_the_configuration_says_so(host: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_exposure(OPEN, host)
    for word in (repr(host), "tenancy.mode to keys", "tenancy.allow_open_on_network"):
        assert word in str(caught.value)
    check_exposure(TenancySection(allow_open_on_network=True), host)
    check_exposure(TenancySection(mode="keys", keys_file="/keys"), host)


def config_file(folder: Path, args: dict[str, Any] | None = None, **more: Any) -> Path:
    path = folder / "config.yaml"
    application = {"import_path": "deployments.app:build_app", "args": args or {}}
    path.write_text(yaml.safe_dump({"applications": [application], **more}))
    return path


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    path = config_file(tmp_path)
    assert read_address(path, None, None) == Address("127.0.0.1", 8000)
    path = config_file(tmp_path, http_options={"host": "0.0.0.0", "port": 81})
    assert read_address(path, None, None) == Address("0.0.0.0", 81)
    assert read_address(path, "::1", 82) == Address("::1", 82)


@pytest.mark.parametrize(
    "options", [{"hots": "x"}, {"port": "81"}, {"host": 7}, {"port": True}, [], None]
)
def test_addresses_that_are_none_are_refused(tmp_path: Path, options: Any) -> None:
    with pytest.raises(ConfigError, match="http_options"):
        read_address(config_file(tmp_path, http_options=options), None, None)


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8"),
        ("0.0.0.0", "http://127.0.0.1:8"),
        ("::", "http://[::1]:8"),
        ("::1", "http://[::1]:8"),
    ],
)
def test_a_client_on_this_machine_has_an_url(host: str, url: str) -> None:
    assert Address(host, 8).url == url


# ---- a server that does not start ----------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"tenancy": {"mode": "keys", "keys_file": "none.yaml"}}, ["none.yaml: No such file"]),
        ({"adapters": {"root": "file://config.yaml/x"}}, ["config.yaml/x"]),
        ({"adapters": {"root": "ftp://x"}}, ["ftp://x"]),
        ({"tenancy": {"mode": "cloosed"}}, ["tenancy.mode", "cloosed"]),
        ({}, ["'0.0.0.0'", "tenancy.mode to keys"]),
    ],
)
def test_a_server_that_cannot_start_says_why_in_a_sentence(
    tmp_path: Path, args: dict[str, Any], words: list[str]
) -> None:
    host = "127.0.0.1" if args else "0.0.0.0"
    path = config_file(
        tmp_path, {"models": [MODEL], **args}, http_options={"host": host, "port": 0}
    )
    command = [sys.executable, "-m", "deployments.local.serve", "--config", str(path)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert all(word in result.stderr for word in words), result.stderr


def test_of_a_failed_deployment_our_own_sentence_is_told() -> None:
    ours = """The deployment failed to start 3 times in a row. See controller logs. Error:
Traceback (most recent call last):
  File "deployments/app.py", line 1, in __init__
    raise engine.client.EngineFailed: nothing
adapter_store.errors.SourceUnavailable: the bucket 'b' does not exist

"""
    assert reason(ours) == "the bucket 'b' does not exist"
    anybodys = "The deployment failed.\nTraceback (most recent call last):\nKeyError: 'x'"
    assert reason(anybodys) == anybodys


def test_our_log_records_are_in_serves_file_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "OURS", ("test-ours",))
    monkeypatch.setattr(logs, "SERVE", "test-serve")
    file = logging.FileHandler(tmp_path / "log")
    buffer = logging.handlers.MemoryHandler(1000, target=file)
    ours, serves = logging.getLogger("test-ours.module"), logging.getLogger("test-serve")
    logs.log_to_serves_file()  # nothing is set up yet
    assert logging.getLogger("test-ours").handlers == []
    serves.addHandler(buffer)
    try:
        logs.log_to_serves_file()
        ours.info("news")
        assert (tmp_path / "log").read_text() == "news\n"
    finally:
        buffer.close()
        file.close()
