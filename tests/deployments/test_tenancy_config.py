"""Tenancy and adapters in the configuration: what is accepted, and how the rest is refused."""

from pathlib import Path
from typing import Any

import pytest

from deployments.config import check_exposure, is_loopback, load_config, open_adapter_store
from deployments.config_sections import TenancySection
from deployments.policy.admission import Limits
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


def test_limits_are_read_and_the_keys_file_becomes_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tenancy = {**KEYS, "requests_per_minute": 60, "max_concurrent_requests": 4}
    config = load_config({"models": [MODEL], "tenancy": tenancy})
    assert config.tenancy.limits == Limits(60, 4)
    assert config.tenancy.keys_file == str(tmp_path / "keys.yaml")
    assert load_config({"models": [MODEL]}).tenancy.limits == Limits()


def test_the_configured_endpoint_reaches_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    monkeypatch.setattr(
        "deployments.config.AdapterStore", lambda *args, **more: opened.append((args, more))
    )
    where = {"root": "s3://bucket/prefix", "endpoint_url": "http://127.0.0.1:9000"}
    open_adapter_store(load_config({"models": [MODEL], "adapters": where}).adapters)
    (arguments, more) = opened[0]
    assert arguments[0] == "s3://bucket/prefix"
    assert (more["endpoint_url"], more["may_write"]) == ("http://127.0.0.1:9000", True)


@pytest.mark.parametrize(
    ("root", "endpoint_url"),
    [("s3://bucket/prefix", "http://127.0.0.1:9000"), ("file:///srv/adapters", None)],
)
def test_the_endpoint_of_the_environment_is_only_for_s3(
    root: str, endpoint_url: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Any] = []
    monkeypatch.setattr(
        "deployments.config.AdapterStore", lambda *args, **more: opened.append(more)
    )
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:9000")
    open_adapter_store(load_config({"models": [MODEL], "adapters": {"root": root}}).adapters)
    assert [(more["endpoint_url"], more["may_write"]) for more in opened] == [(endpoint_url, True)]


# ---- where a server listens ----------------------------------------------------------------

OPEN = TenancySection()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "localhost", "::1", None])
def test_open_mode_is_allowed_on_loopback(host: str | None) -> None:
    assert host is None or is_loopback(host)
    check_exposure(OPEN, host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "reef.example", "127.0.0.1.nip.io"])
def test_open_mode_on_a_network_must_be_allowed_by_the_configuration(host: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_exposure(OPEN, host)
    for word in (repr(host), "tenancy.mode to keys", "tenancy.allow_open_on_network"):
        assert word in str(caught.value)
    check_exposure(TenancySection(allow_open_on_network=True), host)
    check_exposure(TenancySection(mode="keys", keys_file="/keys"), host)


def test_control_tokens_in_messages_are_text_where_tenants_share_a_server() -> None:
    for tenancy, wanted in (({}, False), (KEYS, True)):
        config = load_config({"models": [MODEL], "tenancy": tenancy})
        assert config.ingress.split_special_tokens is wanted
    given = load_config(
        {"models": [MODEL], "tenancy": KEYS, "ingress": {"split_special_tokens": False}}
    )
    assert given.ingress.split_special_tokens is False
