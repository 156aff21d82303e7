"""Keys, tenants and their limits: the file, and what HTTP says to the right and the wrong ones."""

import asyncio
import hashlib
import json
import logging
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.ingress.http_errors import ApiError
from deployments.policy.admission import SECOND_NS, Limits
from deployments.tenants.new_key import main
from deployments.tenants.tenants import Everybody, Keyring, Tenant
from engine.config import ConfigError
from tests.deployments.fakes import Client, FakeEngine, Server, serving, until

COMPLETIONS = "/v1/completions"
ACME, UMBRELLA, PROMETHEUS = "reef-" + "a" * 40, "reef-" + "u" * 40, "reef-" + "m" * 40
DEFAULTS = Limits(100, 10)


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def keys_file(folder: Path, **more: Any) -> Path:
    path = folder / "keys.yaml"
    tenants = {"acme": {"keys": [digest(ACME)]}, "umbrella": {"keys": [digest(UMBRELLA)]}}
    path.write_text(
        yaml.safe_dump({"tenants": tenants, "metrics_keys": [digest(PROMETHEUS)], **more})
    )
    return path


def bearer(key: str) -> str:
    return f"Bearer {key}"


# ---- the file ------------------------------------------------------------------------------


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
def test_what_is_no_known_key_is_401_and_is_not_repeated(
    tmp_path: Path, header: str | None
) -> None:
    ring = Keyring(keys_file(tmp_path), DEFAULTS)
    with pytest.raises(ApiError) as caught:
        ring.identify(header)
    error = caught.value
    assert (error.status, error.code) == (401, "invalid_api_key")
    assert error.headers()["www-authenticate"].startswith("Bearer")
    assert ACME not in error.message


def test_a_hash_is_no_key(tmp_path: Path) -> None:
    ring = Keyring(keys_file(tmp_path), DEFAULTS)
    with pytest.raises(ApiError):
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
    with pytest.raises(ConfigError) as caught:
        Keyring(path, DEFAULTS)
    assert str(path) in str(caught.value) and words in str(caught.value)
    assert ACME not in str(caught.value)


def test_a_missing_file_is_refused_with_its_path(tmp_path: Path) -> None:
    path = tmp_path / "nowhere.yaml"
    with pytest.raises(ConfigError, match=rf"keys_file {path}: No such file"):
        Keyring(path, DEFAULTS)


def test_a_changed_file_is_read_again_and_a_broken_one_keeps_the_old_keys(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = keys_file(tmp_path)
    ring = Keyring(path, DEFAULTS)
    keys_file(tmp_path, tenants={"umbrella": {"keys": [digest(UMBRELLA)]}})
    ring.refresh()
    with pytest.raises(ApiError):
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
            except ApiError:
                return False

        await until(knows_acme)

    asyncio.run(run())


# ---- the command ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["keys.yaml", "keys.json"])
def test_a_new_key_is_shown_once_and_its_hash_is_what_the_file_has(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    made: list[str] = []
    for arguments in (["acme"], ["umbrella"], ["acme"], ["--metrics"]):
        assert main(["new-key", *arguments, "--file", str(path)]) == 0
        made.append(capsys.readouterr().out.strip())
    assert len(set(made)) == 4 and all(k.startswith("reef-") and len(k) > 40 for k in made)
    assert not any(key in path.read_text() for key in made)
    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == [name], "nothing else is left behind"
    ring = Keyring(path, DEFAULTS)
    assert [ring.identify(bearer(k)).name for k in made[:3]] == ["acme", "umbrella", "acme"]
    ring.check_metrics(bearer(made[3]))


def test_a_new_key_leaves_the_rest_of_the_file_as_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tenants = {
        "acme": {"keys": [digest(ACME)], "requests_per_minute": None, "namespaces": ["lab"]},
        "idle": {"max_concurrent_requests": 4},
    }
    target = keys_file(tmp_path, tenants=tenants)
    target.chmod(0o640)
    link = tmp_path / "link.yaml"
    link.symlink_to(target)
    assert main(["new-key", "new", "--file", str(link)]) == 0
    added = digest(capsys.readouterr().out.strip())
    wanted = {"tenants": {**tenants, "new": {"keys": [added]}}}
    assert yaml.safe_load(target.read_text()) == {**wanted, "metrics_keys": [digest(PROMETHEUS)]}
    assert link.is_symlink() and target.stat().st_mode & 0o777 == 0o640


def test_a_new_key_without_a_file_comes_with_the_lines_to_add(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["new-key", "acme"]) == 0
    shown = capsys.readouterr()
    lines = shown.err.partition("\n\n")[2]
    assert yaml.safe_load(lines) == {"tenants": {"acme": {"keys": [digest(shown.out.strip())]}}}


def test_a_broken_file_gets_no_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text("tenants: [")
    assert main(["new-key", "acme", "--file", str(path)]) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and str(path) in shown.err and path.read_text() == "tenants: ["


@pytest.mark.parametrize("arguments", [[], ["new-key"], ["new-key", "a", "--metrics"]])
def test_a_command_that_says_too_little_or_too_much_is_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


# ---- over HTTP -----------------------------------------------------------------------------


def in_server(test: Callable[[Server], Awaitable[None]], **how: Any) -> None:
    async def run() -> None:
        async with serving(**how) as server:
            await test(server)

    asyncio.run(run())


def limited(folder: Path, **limits: int) -> Keyring:
    tenants = {
        "acme": {"keys": [digest(ACME)], **limits},
        "umbrella": {"keys": [digest(UMBRELLA)]},
    }
    return Keyring(keys_file(folder, tenants=tenants), Limits())


ROUTES = [
    ("POST", COMPLETIONS, {"model": "base", "prompt": "x"}),
    ("POST", "/v1/chat/completions", {"model": "base", "messages": []}),
    ("GET", "/v1/models", None),
    ("GET", "/v1/models/red", None),
]


@pytest.mark.parametrize("key", [None, "", "reef-wrong", ACME + "x", "sk-none"])
def test_every_route_of_tenants_is_401_without_a_right_key(
    tmp_path: Path, key: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)

    async def test(server: Server) -> None:
        for method, path, body in ROUTES:
            answer = await server.call(method, path, body, key)
            assert answer.status == 401 and answer.error["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == 'Bearer realm="reef"'
        assert server.engine.requests == []
        metrics = (await server.call("GET", "/metrics", key=PROMETHEUS)).body.decode()
        assert f'reef_requests_total{{route="{COMPLETIONS}",status="401"}} 1.0' in metrics
        for secret in (key, ACME, digest(ACME)):
            assert not secret or (secret not in metrics and secret not in caplog.text)

    in_server(test, tenants=limited(tmp_path))


def test_health_needs_no_key_and_metrics_need_their_own(tmp_path: Path) -> None:
    async def test(server: Server) -> None:
        assert (await server.call("GET", "/health")).status == 200
        for key in (None, ACME, "x"):
            assert (await server.call("GET", "/metrics", key=key)).status == 401
        assert (await server.call("GET", "/metrics", key=PROMETHEUS)).status == 200
        assert (await server.post(COMPLETIONS, key=PROMETHEUS, prompt="x")).status == 401

    in_server(test, tenants=limited(tmp_path))
    ring = Keyring(tmp_path / "keys.yaml", Limits(), metrics_are_open=True)
    ring.check_metrics(None)


def test_a_right_key_is_served_and_its_tenant_is_the_scope_of_the_prefix_cache(
    tmp_path: Path,
) -> None:
    async def test(server: Server) -> None:
        for key in (ACME, UMBRELLA):
            answer = await server.post(COMPLETIONS, key=key, prompt="x")
            assert answer.json["choices"][0]["text"] == "X"
        assert [r.tenant for r in server.engine.requests] == ["acme", "umbrella"]

    in_server(test, tenants=limited(tmp_path))


def test_everybody_is_the_public_tenant_where_there_are_no_keys() -> None:
    async def test(server: Server) -> None:
        for key in (None, "none"):
            assert (await server.post(COMPLETIONS, key=key, prompt="x")).status == 200
        assert {r.tenant for r in server.engine.requests} == {"public"}

    in_server(test)


def test_requests_beyond_the_rate_are_429_until_the_time_that_is_said(tmp_path: Path) -> None:
    now_ns = [7]

    async def test(server: Server) -> None:
        async def status(key: str = ACME, model: str = "base") -> int:
            return (await server.post(COMPLETIONS, key=key, model=model, prompt="x")).status

        assert [await status(), await status(model="nobody")] == [200, 404]
        refused = await server.post(COMPLETIONS, key=ACME, prompt="x")
        assert refused.status == 429 and refused.error["code"] == "rate_limit_exceeded"
        assert refused.headers["retry-after"] == "30" and "2 requests per minute" in str(
            refused.error["message"]
        )
        assert await status(UMBRELLA) == 200, "one tenant's limit is no other's"
        now_ns[0] += 29 * SECOND_NS
        assert await status() == 429
        now_ns[0] += SECOND_NS
        assert [await status(), await status()] == [200, 429]
        text = (await server.call("GET", "/metrics", key=PROMETHEUS)).body.decode()
        labels = 'limit="requests_per_minute",tenant="acme"'
        assert f"reef_refused_requests_total{{{labels}}} 3.0" in text

    in_server(test, tenants=limited(tmp_path, requests_per_minute=2), clock_ns=lambda: now_ns[0])


def test_everybody_together_has_the_limits_of_the_configuration() -> None:
    async def test(server: Server) -> None:
        statuses = [(await server.call("GET", "/v1/models")).status for _ in range(3)]
        assert statuses == [200, 200, 429]

    in_server(test, tenants=Everybody(Limits(requests_per_minute=2)), clock_ns=lambda: 0)


def start(server: Server, stream: bool = True, **fields: Any) -> Client:
    body = {"model": "base", "prompt": "abc", "stream": stream, **fields}
    return Client(server.api, "POST", COMPLETIONS, json.dumps(body).encode(), ACME)


ENDINGS = ["it is finished", "the client hangs up", "the call is cancelled", "the engine dies"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_place_is_free_again_however_its_request_ends(
    tmp_path: Path, ending: str, stream: bool
) -> None:
    async def test(server: Server) -> None:
        server.engine.running.clear()
        first = start(server, stream)
        await until(lambda: len(server.engine.requests) == 1)
        refused = await server.post(COMPLETIONS, key=ACME, prompt="y")
        assert refused.status == 429 and refused.error["code"] == "rate_limit_exceeded"
        assert int(refused.headers["retry-after"]) >= 1
        others = [("GET", "/health", None), ("GET", "/metrics", PROMETHEUS)]
        for method, path, key in others:
            assert (await server.call(method, path, key=key)).status == 200
        if ending == "the client hangs up":
            first.hang_up()
        elif ending == "the call is cancelled":
            first.done.cancel()
        elif ending == "the engine dies":
            server.engine.die()
        server.engine.running.set()
        await asyncio.gather(first.done, return_exceptions=True)
        server.engine.is_up = True
        assert (await server.post(COMPLETIONS, key=ACME, prompt="z")).status == 200

    in_server(test, engine=FakeEngine(), tenants=limited(tmp_path, max_concurrent_requests=1))


@pytest.mark.parametrize("body", [{"prompt": ""}, {"model": "nobody"}, {"nonsense": 1}])
def test_a_request_that_is_refused_gives_its_place_back(
    tmp_path: Path, body: dict[str, Any]
) -> None:
    async def test(server: Server) -> None:
        for _ in range(3):
            refused = await server.post(COMPLETIONS, key=ACME, **{"prompt": "x", **body})
            assert refused.status in (400, 404)
        assert (await server.post(COMPLETIONS, key=ACME, prompt="x")).status == 200

    in_server(test, tenants=limited(tmp_path, max_concurrent_requests=1))
