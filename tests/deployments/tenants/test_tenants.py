"""The keys file: which key is which tenant's, what is refused, and how changes are followed."""

import asyncio
import itertools
import json
import logging
import os
import time
from pathlib import Path

import pytest

from deployments.ingress.http_errors import as_api_error
from deployments.policy.admission import Limits
from deployments.strict_yaml import read_yaml
from deployments.tenants import keys_file as keys_file_module
from deployments.tenants import tenants as tenants_module
from deployments.tenants.keys_file import (
    Keys,
    KeysDocument,
    KeysFileError,
    TenantEntry,
    read_keys,
)
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
        "heavy": {"keys": [digest("heavy")], "weight": 2.5},
        "umbrella": {"keys": [digest(UMBRELLA)]},
    }
    ring = Keyring(keys_file(tmp_path, tenants=tenants), DEFAULTS)
    acme = ring.identify(bearer(ACME))
    assert acme == Tenant("acme", Limits(None, 3), ("lab",)) == ring.identify(bearer("another"))
    assert acme.namespaces == ("acme", "public", "lab")
    assert ring.identify(f"bearer  {UMBRELLA}") == Tenant("umbrella", DEFAULTS)
    assert ring.identify(bearer("heavy")) == Tenant("heavy", DEFAULTS, weight=2.5)


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
        ("tenants: {acme: {weight: 0}}", "tenants.acme.weight: Input should be greater than"),
        ("tenants: {acme: {weight: .nan}}", "tenants.acme.weight"),
        ("tenants: {acme: {namespaces: [a/b]}}", "tenants.acme.namespaces.0"),
        ("tenants: {a/b: {}}", "tenants.a/b"),
        ("tenants: {acme: {}, acme: {}}", "'acme' comes twice in line 1"),
        (f"tenants: {{a: {{keys: [{'a' * 64}]}}, b: {{keys: [{'a' * 64}]}}}}", "comes twice"),
        ("tenants:\n  {acme", "line"),
        (f"tenants:\n  acme: {ACME}: {ACME}", "line 2"),
        (f"{ACME}: acme", "unknown key"),
        ("\x00", "keys.yaml"),
        ("tenants:\n  2026-13-01: {}", "'2026-13-01' cannot be read (month must be in 1..12)"),
        ("tenants:\n  2026-13-01: {}", "put it in quotes in line 2"),
        ("tenants:\n  2026-12-01: {}", "should be a valid string: put it in quotes"),
        ("tenants: {123: {}}", "tenants.123.[key]: Input should be a valid string: put it in quo"),
        ("tenants: {no: {}}", "put it in quotes"),
        (
            f"tenants: {{a: {{keys: [{'1' * 64}]}}}}",
            "tenants.a.keys.0: Input should be a valid str",
        ),
        (f"tenants: {{a: {{keys: [{'1' * 5000}]}}}}", "cannot be read"),
        (f"tenants: {{a: {{requests_per_minute: 2026-02-30, keys: [{ACME}]}}}}", "'2026-02-30'"),
        ("? [a, b]\n: c", "line 1"),
        ("? {a: b}\n: c", "line 1"),
        ("&a [*a]", "the document"),
        ("tenants: &t {acme: *t}", "keys.yaml"),
        ("tenants: !!python/object:os.system {}", "line 1"),
        ("tenants: !!binary '!'", "tenants: "),
        ("tenants: !!timestamp x", "line 1"),
        ("tenants: !!int x", "line 1"),
        ("tenants: !!map x", "line 1"),
        ("[" * 5000, "keys.yaml"),
        ("a: " * 5000, "line 1"),
        ("--- {}\n--- {}", "line 2"),
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


def test_following_goes_on_after_any_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("deployments.tenants.tenants.FOLLOW_S", 0.01)
    read, errors = tenants_module.read_keys, [KeyError(ACME), RecursionError(), MemoryError()]
    looks = itertools.count()

    def fail(path: Path, defaults: Limits, shared: tuple[str, ...]) -> Keys:
        if errors:
            raise errors.pop()
        return read(path, defaults)

    def look_or_fail(path: Path) -> object:
        if (number := next(looks)) % 2:
            raise RuntimeError("no look")
        return number

    async def run() -> None:
        ring = Keyring(keys_file(tmp_path), DEFAULTS)
        monkeypatch.setattr(tenants_module, "read_keys", fail)
        monkeypatch.setattr(tenants_module, "_stamp", look_or_fail)
        ring.start()
        await until(lambda: not errors)
        assert ring.identify(bearer(ACME)).name == "acme"
        keys_file(tmp_path, tenants={"umbrella": {"keys": [digest(UMBRELLA)]}})
        await until(lambda: digest(UMBRELLA) in {key.hex() for key in ring._keys.holders})
        assert "no look" in caplog.text and ACME not in caplog.text

    asyncio.run(run())


def test_names_and_hashes_of_many_tenants_are_looked_up_and_not_searched_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Searching lists of 50,000 takes minutes."""
    num = 50_000
    path = tmp_path / "names.yaml"
    path.write_text("".join(f"t{n}: 0\n" for n in range(num)))
    hashes = [f"{n:064x}" for n in range(2 * num)]
    tenants = {f"t{n}": TenantEntry(keys=[hashes[n]]) for n in range(num)}
    document = KeysDocument.model_construct(tenants=tenants, metrics_keys=hashes[num:])
    monkeypatch.setattr(keys_file_module, "parse_document", lambda path: document)
    began_s = time.process_time()
    assert len(read_yaml(path)) == num
    assert len(read_keys(path, DEFAULTS).holders) == num
    assert time.process_time() - began_s < 20


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
