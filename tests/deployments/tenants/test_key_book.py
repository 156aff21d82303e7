"""Keys in the adapter store: what is written by one process is what all others follow."""

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from adapter_store import followed_log
from adapter_store.errors import AdapterStoreError, SourceUnavailable
from adapter_store.file_store import FileStore
from adapter_store.store import AdapterStore
from deployments.config_sections import AdminSection
from deployments.ingress.admin import Admin
from deployments.policy.admission import Limits
from deployments.tenants.key_book import KeyBook, KeyEnded, KeyNotFound
from deployments.tenants.key_id import hash_key
from deployments.tenants.key_table import KeyTable
from deployments.tenants.tenants import KeyRefused, Keyring, RightMissing
from reef.__main__ import main
from tests.deployments.support.fakes import Server, serving
from tests.deployments.support.keys import ACME, bearer, digest, keys_file


class Clock:
    def __init__(self) -> None:
        self.now_s = 1_900_000_000.0

    def __call__(self) -> float:
        return self.now_s


class Place:
    """One process that writes, and another one that checks keys."""

    def __init__(self, folder: Path, **tenants: Any) -> None:
        self.clock = Clock()
        self.book = KeyBook(FileStore(folder / "store"), wall_clock=self.clock)
        self.other = KeyBook(FileStore(folder / "store"), wall_clock=self.clock)
        path = keys_file(folder, tenants=tenants) if tenants else None
        self.ring = Keyring(path, Limits(requests_per_minute=7), False, self.other, self.clock)

    def who(self, key: str) -> str:
        self.ring.refresh_store()
        return self.ring.identify(bearer(key)).name


def test_a_key_is_valid_elsewhere_once_its_record_is_read_until_it_ends(tmp_path: Path) -> None:
    place = Place(tmp_path, acme={"keys": [digest(ACME)], "requests_per_minute": 60})
    made, key = place.book.create("acme", "ci", ["infer"], by="ann")
    with pytest.raises(KeyRefused):
        place.ring.identify(bearer(key))
    assert place.who(key) == "acme" == place.who(ACME)
    assert place.ring.identify(bearer(key)).limits.requests_per_minute == 60, "the file's"
    other = place.book.create("else", "x", ["infer"])[1]
    assert place.who(other) == "else"
    assert place.ring.identify(bearer(other)).limits.requests_per_minute == 7, "the config's"
    place.book.revoke(made.id)
    with pytest.raises(KeyRefused, match="revoked"):
        place.who(key)
    for call in (place.book.rotate, place.book.expire):
        with pytest.raises(KeyEnded):
            call(made.id, 60.0)
    with pytest.raises(KeyNotFound):
        place.book.revoke("0" * 12)


def test_a_rotated_key_and_its_successor_are_both_valid_for_the_overlap(tmp_path: Path) -> None:
    place = Place(tmp_path)
    old, old_key = place.book.create("acme", "ci", ["infer", "publish"], place.clock.now_s + 1000)
    place.clock.now_s += 500
    new, new_key = place.book.rotate(old.id, 100)
    assert (new.tenant, new.name, new.scopes) == ("acme", "ci", ("infer", "publish"))
    assert new.expires_s == place.clock.now_s + 1000
    assert place.who(old_key) == place.who(new_key) == "acme"
    place.clock.now_s += 100
    assert place.who(new_key) == "acme"
    with pytest.raises(KeyRefused, match="expired"):
        place.who(old_key)


def test_each_scope_opens_its_own_and_nothing_else(tmp_path: Path) -> None:
    place = Place(tmp_path)
    made = {
        scope: place.book.create("acme" if scope in ("infer", "publish") else "", "x", [scope])[1]
        for scope in ("infer", "publish", "admin", "metrics")
    }
    place.ring.refresh_store()
    for scope, key in made.items():
        opened: list[str] = []
        for name, call in (
            ("infer", place.ring.identify),
            ("metrics", place.ring.check_metrics),
            ("manage", place.ring.identify_publisher),
        ):
            try:
                call(bearer(key))
                opened.append(name)
            except (KeyRefused, RightMissing):
                pass
        assert opened == [{"publish": "manage", "admin": "manage"}.get(scope, scope)]
    assert place.ring.identify_publisher(bearer(made["publish"])).may_manage("acme")
    assert not place.ring.identify_publisher(bearer(made["publish"])).may_manage("else")
    assert place.ring.identify_publisher(bearer(made["admin"])).may_manage("else")


@pytest.mark.parametrize(
    ("tenant", "scopes", "words"),
    [
        ("", ["infer"], "needs a tenant"),
        ("acme", ["infer", "admin"], "name none"),
        ("acme", [], "none"),
        ("acme", ["fly"], "'fly'"),
        ("a/b", ["infer"], "a/b"),
    ],
)
def test_a_key_that_makes_no_sense_is_not_made(
    tmp_path: Path, tenant: str, scopes: list[str], words: str
) -> None:
    place = Place(tmp_path)
    with pytest.raises((ValueError, AdapterStoreError), match=words):
        place.book.create(tenant, "x", scopes)
    assert not list(place.book.list())


def test_snapshots_stand_for_records_and_no_object_holds_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(followed_log, "SNAPSHOT_EVERY", 4)
    place = Place(tmp_path)
    made = [place.book.create("acme", f"k{n}", ["infer"]) for n in range(6)]
    place.book.revoke(made[0][0].id)
    place.book.rotate(made[1][0].id, 60)
    store = FileStore(tmp_path / "store")
    assert len(store.list("keys/snapshots/")) == 2
    store.remove(store.list("keys/log/")[:8])
    again = KeyBook(store, wall_clock=place.clock)
    assert list(again.list()) == list(place.book.list()) and len(again.list()) == 7
    again.create("acme", "more", ["infer"])
    files = b"".join(p.read_bytes() for p in (tmp_path / "store").rglob("*") if p.is_file())
    assert not any(key.encode() in files for _, key in made)


def test_two_writers_lose_nothing(tmp_path: Path) -> None:
    place = Place(tmp_path)
    for number in range(3):
        place.book.create("acme", f"a{number}", ["infer"])
        place.other.create("acme", f"b{number}", ["infer"])
    place.book.refresh()
    assert [key.name for key in place.book.list()] == ["a0", "b0", "a1", "b1", "a2", "b2"]


def test_a_record_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    table = KeyTable()
    fields = {"tenant": "acme", "name": "x", "scopes": ["infer"], "created_s": 1, "expires_s": None}
    bad = [
        {"kind": "create", "digest": "00", **fields},
        {"kind": "create", "digest": "0" * 64, **fields, "scopes": ["admin"]},
        {"kind": "end", "digest": "0" * 64, "revoked_s": 1.0},
        {"kind": "fly"},
    ]
    for record in bad:
        with pytest.raises(AdapterStoreError, match="key record 1"):
            table.apply(record)
    assert not table.list() and table.num_records == 0


def test_without_its_store_a_server_keeps_the_keys_that_it_knows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(tmp_path)
    key = place.book.create("acme", "x", ["infer"])[1]
    assert place.who(key) == "acme"

    def refuse() -> None:
        raise SourceUnavailable("down")

    monkeypatch.setattr(place.other, "refresh", refuse)
    for _ in range(3):
        assert place.who(key) == "acme"
    assert caplog.text.count("stay as they were") == 1


def test_the_command_makes_lists_rotates_and_ends_keys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = ["--root", f"file://{tmp_path}/store", "--cache", str(tmp_path / "cache")]

    def run(*arguments: str) -> str:
        assert main(["keys", *arguments, *root]) == 0
        return capsys.readouterr().out.strip()

    key = run("create", "acme", "--name", "ci", "--scope", "infer", "--expires", "90d")
    place = Place(tmp_path)
    found = place.book.find(hash_key(key))
    assert found is not None and found.id in run("list") and key not in run("list")
    new = run("rotate", found.id, "--overlap", "1h")
    assert new.startswith("reef-") and new != key
    run("expire", found.id, "0s")
    assert run("list").count("\n") == 0 and run("list", "--all").count("\n") == 1
    run("revoke", found.id)
    assert "revoked" in run("list", "--all")
    assert main(["keys", "create", "--name", "x", *root]) == 2
    assert "needs a tenant" in capsys.readouterr().err


def test_keys_are_managed_over_http_by_admin_keys_alone_and_are_in_no_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    store = AdapterStore(f"file://{tmp_path}/store", tmp_path / "cache", 2**20)
    book = KeyBook(store.objects)
    ring = Keyring(None, Limits(), False, book)
    admin_key = book.create("", "ann", ["admin"])[1]
    publish_key = book.create("acme", "ci", ["publish"])[1]
    seen: list[str] = []

    async def test(server: Server) -> None:
        async def call(
            method: str, path: str, body: object = None, key: str = admin_key, status: int = 200
        ) -> Any:
            answer = await server.call(method, f"/admin/v1/keys{path}", body, key)
            assert answer.status == status, answer.body
            seen.append(answer.body.decode())
            return answer.json

        made = await call("POST", "", {"tenant": "acme", "name": "bob", "expires_in_s": 60})
        key = made.pop("key")
        seen.pop()
        assert made["scopes"] == ["infer"] and made["created_by"] == "admin ann"
        models = await server.call("GET", "/v1/models", key=key)
        assert models.status == 200
        assert made in (await call("GET", "?tenant=acme"))["keys"]
        new = await call("POST", f"/{made['id']}/rotate", {"overlap_s": 5})
        seen.pop()
        await call("POST", f"/{new['id']}/expire", {"expires_in_s": None})
        revoked = await call("POST", f"/{made['id']}/revoke")
        assert not revoked["is_valid"]
        assert (await server.call("GET", "/v1/models", key=key)).status == 401
        await call("POST", f"/{made['id']}/rotate", {}, status=409)
        await call("POST", "/0123/revoke", status=404)
        await call("POST", "", {"name": "bob"}, status=400)
        await call("POST", "", {"tenant": "acme", "name": "bob", "scopes": ["fly"]}, status=400)
        await call("GET", "", key=publish_key, status=403)
        await call("GET", "", key=new["key"], status=403)
        texts = [*seen, caplog.text, json.dumps(dict(models.headers))]
        for secret in (key, new["key"], admin_key, publish_key):
            for text in texts:
                assert secret not in text and digest(secret) not in text

    async def run() -> None:
        admin = Admin(store, ring, AdminSection(), tmp_path / "uploads")
        try:
            async with asyncio.timeout(30), serving(tenants=ring, admin=admin, key_book=book) as s:
                await test(s)
        finally:
            admin.close()

    asyncio.run(run())
