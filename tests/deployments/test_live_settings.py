"""Which settings change while the server runs, and what becomes of them."""

import logging
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.config import load_config
from deployments.config_sections import IngressSection
from deployments.ingress.runtime_adapters import RuntimeAdapters
from deployments.live_settings import configured, live_keys, reconfigured
from deployments.local.serve_yaml import read_application
from deployments.policy.admission import Limits
from deployments.tenants.tenants import Everybody, Keyring
from engine.config import ConfigError
from tests.deployments.support.fakes import Server, in_server
from tests.deployments.support.keys import ACME, bearer, keys_file

OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"
ARGS: dict[str, Any] = {
    "models": [{"id": "a", "source": "/a"}, {"id": "b", "source": "/b"}],
    "tenancy": {"requests_per_minute": 5},
}


def test_each_live_key_is_in_the_documents_table() -> None:
    text = OPERATIONS.read_text()
    section = text[text.index("### Changes without a restart") :].split("\n## ")[0]
    for kind in ("Ingress", "Engine"):
        for key in live_keys(kind):
            all_of_it = f"{key.rsplit('.', 1)[0]}.*"
            assert f"`{key}`" in section or f"`{all_of_it}`" in section, key


def test_what_stands_in_user_config_replaces_the_same_keys_of_args() -> None:
    config = load_config(ARGS)
    changed = configured(
        config,
        "Ingress",
        {"tenancy": {"max_concurrent_requests": 3}, "ingress": {"max_body_bytes": "1KiB"}},
    )
    assert changed.tenancy.limits == Limits(5, 3)
    assert changed.ingress.max_body_bytes == 1024
    assert changed.models == config.models
    scaled = configured(config, "Engine-1", {"replicas": {"autoscaling": {"busy": 0.5}}})
    assert [m.replicas.autoscaling.busy for m in scaled.models] == [0.75, 0.5]
    assert configured(config, "Engine", None) == config


@pytest.mark.parametrize(
    ("deployment", "user_config", "message"),
    [
        ("Ingress", {"ingress": {"replicas": 2}}, "ingress.replicas is not a key that changes"),
        ("Ingress", {"tenancy": {"requests_per_minute": 0}}, "tenancy.requests_per_minute"),
        ("Ingress", {"replicas": {"autoscaling": {"busy": 0.5}}}, "replicas.autoscaling.busy"),
        ("Engine", {"replicas": {"autoscaling": {"busy": 2.0}}}, "replicas.autoscaling.busy"),
        ("Engine", {"engine": {"max_num_seqs": 1}}, "engine.max_num_seqs is not a key"),
        ("Engine-2", {"replicas": {"autoscaling": {"busy": 0.5}}}, "there are only 2 models"),
        ("Engine-0", {}, "'Engine-0' is neither"),
        ("", {"models": []}, "'' is neither"),
        ("Ingress", {"adapters": {"load_from": ["here"]}}, "'here' is no absolute path"),
        ("Ingress", 7, "must have keys"),
    ],
)
def test_what_does_not_change_without_a_restart_is_refused_by_name(
    deployment: str, user_config: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        configured(load_config(ARGS), deployment, user_config)


def test_a_mistake_ends_a_start_and_changes_nothing_later(
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = load_config(ARGS)
    with pytest.raises(ConfigError):
        reconfigured(config, "Ingress", {"ingress": {"port": 1}}, is_running=False)
    with caplog.at_level(logging.ERROR):
        assert reconfigured(config, "Ingress", {"ingress": {"port": 1}}, is_running=True) is None
    assert "the settings stay as they were: user_config of Ingress: ingress.port" in caplog.text


def test_reef_serve_reads_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    entries = [{"name": "Ingress", "user_config": {"tenancy": {"requests_per_minute": 9}}}]
    application = {"import_path": "x:y", "args": ARGS, "deployments": entries}
    path.write_text(yaml.safe_dump({"applications": [application]}))
    read = read_application(path)
    assert load_config(read["args"]).tenancy.requests_per_minute == 9
    assert "deployments" not in read
    application["deployments"] = [{"name": "Ingress", "num_replicas": 3}]
    path.write_text(yaml.safe_dump({"applications": [application]}))
    with pytest.raises(ConfigError, match="a name and a user_config"):
        read_application(path)


def test_requests_that_come_after_a_change_are_held_to_it() -> None:
    async def test(server: Server) -> None:
        body = {"prompt": "x" * 50}
        assert (await server.post("/v1/completions", **body)).status == 200
        server.ingress.settings = IngressSection(max_body_bytes=20)
        assert (await server.post("/v1/completions", **body)).status == 413
        server.ingress.settings = IngressSection(max_body_bytes=10_000)
        server.ingress.tenants.set_limits(Limits(requests_per_minute=1))
        answers = [(await server.post("/v1/completions", **body)).status for _ in range(2)]
        assert answers == [200, 429]
        server.ingress.tenants.set_limits(Limits())
        assert (await server.post("/v1/completions", **body)).status == 200

    in_server(test, tenants=Everybody())


def test_limits_of_tenants_without_their_own_follow_the_settings(tmp_path: Path) -> None:
    keyring = Keyring(keys_file(tmp_path), Limits())
    tenant = keyring.identify(bearer(ACME))
    keyring.set_limits(Limits(requests_per_minute=7))
    keyring.refresh()
    changed = keyring.identify(bearer(ACME))
    assert (tenant.limits.requests_per_minute, changed.limits.requests_per_minute) == (None, 7)


def test_what_clients_may_load_can_be_switched_on_and_off(tmp_path: Path) -> None:
    adapters = RuntimeAdapters(None, (), tmp_path, 1)  # type: ignore[arg-type]
    assert not adapters.is_on
    adapters.allow([str(tmp_path)], None)
    assert adapters.is_on
    adapters.allow((), None)
    assert not adapters.is_on
