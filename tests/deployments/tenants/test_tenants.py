"""The keys file: which key is which tenant's, what is refused, and how changes are followed."""

import asyncio
import json
import logging
import os
from pathlib import Path

import pytest

from deployments.ingress.http_errors import as_api_error
from deployments.policy.admission import Limits
from deployments.tenants.keys_file import KeysFileError
from deployments.tenants.tenant import Tenant
from deployments.tenants.tenants import KeyRefused, Keyring
from tests.deployments.support.fakes import until
from tests.deployments.support.keys import ACME, UMBRELLA, bearer, digest, keys_file

DEFAULTS = Limits(100, 10)


def test_a_key_says_which_tenant_it_is_and_limits_are_the_tenants_own_or_the_default(
    tmp_path: Path,
) -> None:
    own = {"requests_per_minute": None, "max_concurrent_requests": 3}
    tenants = {
        "acme": {"keys": [digest(ACME), digest("another")], "namespaces": ["lab"], **own},
        "umbrella": {"keys": [digest(UMBRELLA)]},
    }
    ring = Keyring(keys_file(tmp_path, tenants=tenants), DEFAULTS)
    acme = ring.identify(bearer(ACME))
    assert acme == Tenant("acme", Limits(None, 3), ("lab",)) == ring.identify(bearer("another"))
    assert acme.namespaces == ("acme", "public", "lab")
    assert ring.identify(f"bearer  {UMBRELLA}") == Tenant("umbrella", DEFAULTS)


def test_json_is_read_too(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"tenants": {"acme": {"keys": [digest(ACME)]}}}, indent=2))
    assert Keyring(path, DEFAULTS).identify(bearer(ACME)).name == "acme"


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer ", f"Basic {ACME}", ACME, bearer("x"), bearer("é")]
)
def test_an_unknown_key_is_refused_and_is_not_repeated(tmp_path: Path, header: str | None) -> None:
    ring = Keyring(keys_file(tmp_path), DEFAULTS)
    with pytest.raises(KeyRefused) as caught:
        ring.identify(header)
    error = as_api_error(caught.value, "identify")
    assert (error.status, error.code) == (401, "invalid_api_key")
    assert error.headers()["www-authenticate"].startswith("Bearer")
    assert ACME not in error.message


def test_a_hash_is_no_key(tmp_path: Path) -> None:
    ring = Keyring(keys_file(tmp_path), DEFAULTS)
    with pytest.raises(KeyRefused):
        ring.identify(bearer(digest(ACME)))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "the document: Input should be a valid dictionary"),
        ("[]", "the document"),
        ("tenants: {acme: {keyz: []}}", "tenants.acme.keyz: unknown key"),
        ("tenants: {acme: {keys: [abc]}}", "tenants.acme.keys.0"),
        (f"tenants: {{acme: {{keys: [{ACME}]}}}}", "tenants.acme.keys.0"),
        ("tenants: {acme: {requests_per_minute: 0}}", "tenants.acme.requests_per_minute"),
        ("tenants: {acme: {max_concurrent_requests: -1}}", "tenants.acme.max_concurrent"),
        ("tenants: {acme: {namespaces: [a/b]}}", "tenants.acme.namespaces.0"),
        ("tenants: {a/b: {}}", "tenants.a/b"),
        ("tenants: {acme: {}, acme: {}}", "'acme' comes twice in line 1"),
        (f"tenants: {{a: {{keys: [{'a' * 64}]}}, b: {{keys: [{'a' * 64}]}}}}", "comes twice"),
        ("tenants:\n  {acme", "line"),
        (f"tenants:\n  acme: {ACME}: {ACME}", "line 2"),
        (f"{ACME}: acme", "unknown key"),
        ("\x00", "keys.yaml"),
    ],
)
def test_a_file_that_is_wrong_is_refused_with_the_place_and_without_any_key(
    tmp_path: Path, text: str, words: str
) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    with pytest.raises(KeysFileError) as caught:
        Keyring(path, DEFAULTS)
    assert str(path) in str(caught.value) and words in str(caught.value)
    assert ACME not in str(caught.value)


def test_a_missing_file_is_refused_with_its_path(tmp_path: Path) -> None:
    path = tmp_path / "nowhere.yaml"
    with pytest.raises(KeysFileError, match=rf"keys_file {path}: No such file"):
        Keyring(path, DEFAULTS)


def test_a_changed_file_is_read_again_and_a_broken_one_keeps_the_old_keys(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = keys_file(tmp_path)
    ring = Keyring(path, DEFAULTS)
    keys_file(tmp_path, tenants={"umbrella": {"keys": [digest(UMBRELLA)]}})
    ring.refresh()
    with pytest.raises(KeyRefused):
        ring.identify(bearer(ACME))
    assert ring.identify(bearer(UMBRELLA)).name == "umbrella"
    for broken in (lambda: path.write_text(f"tenants: {{{ACME}"), path.unlink):
        caplog.clear()
        broken()
        ring.refresh()
        ring.refresh()
        assert ring.identify(bearer(UMBRELLA)).name == "umbrella"
        errors = [r for r in caplog.records if r.levelno == logging.ERROR]
        assert len(errors) == 1 and str(path) in caplog.text, "once for each broken file"
        assert ACME not in caplog.text
    keys_file(tmp_path)
    ring.refresh()
    assert ring.identify(bearer(ACME)).name == "acme"


def test_a_file_that_is_followed_is_read_without_being_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.tenants.tenants.FOLLOW_S", 0.01)

    async def run() -> None:
        path = keys_file(tmp_path, tenants={})
        ring = Keyring(path, DEFAULTS)
        ring.start()
        (tmp_path / "draft").mkdir()
        os.replace(keys_file(tmp_path / "draft"), path)

        def knows_acme() -> bool:
            try:
                return ring.identify(bearer(ACME)).name == "acme"
            except KeyRefused:
                return False

        await until(knows_acme)

    asyncio.run(run())
