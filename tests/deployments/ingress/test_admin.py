"""The admin API over real HTTP, with a real store in a folder: what it does, for whom, and what it
refuses. Uploads that go wrong are in test_uploads.py."""

import asyncio
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from adapter_store.layout import WEIGHTS_NAME
from deployments.config import ConfigError, load_config
from deployments.ingress.api_route import ApiRoute
from deployments.ingress.http_errors import invalid
from tests.adapter_store.adapters import changed
from tests.adapter_store.fake_hub import REPOSITORY, FakeHub, running_hub
from tests.deployments.support.admin import (
    ADAPTERS,
    ADMIN,
    PUBLISH,
    Place,
    administered,
    form,
    in_admin,
)
from tests.deployments.support.keys import ACME, PROMETHEUS, UMBRELLA

# ---- the way of a version ------------------------------------------------------------------


def test_a_version_is_uploaded_named_described_withdrawn_and_brought_back(place: Place) -> None:
    async def test() -> None:
        async with administered(place) as api:
            answer = await api.publish("acme", "sql", form(place.peft), key=PUBLISH)
            assert answer.status == 200, answer.text
            described = answer.json
            ref = place.open().resolve("acme", "sql")
            assert (described["version"], described["digest"]) == (1, ref.digest)
            assert described["aliases"] == ["latest"] and described["base_model"] == "base"
            assert described["published_by"] == "acme/ci" and described["proof"] is None
            module = described["modules"]["model.layers.0.self_attn.q_proj"]
            assert module["lora_rank"] == described["lora_rank"] == 4 and module["scaling"] == 2
            assert described["files"][WEIGHTS_NAME] == (place.peft / WEIGHTS_NAME).stat().st_size
            assert await api.said("sql") == f"{ref.digest[:3]}:X"
            one = f"{ADAPTERS}/acme/sql"
            body = {"alias": "stable", "version": 1}
            assert (await api.post(f"{one}/aliases", body)).json["alias"] == "stable"
            assert (await api.get(f"{one}@stable")).json["aliases"] == ["latest", "stable"]
            for state, said in (("retired", "404"), ("live", f"{ref.digest[:3]}:X")):
                answer = await api.post(f"{one}@1/state", {"state": state})
                assert answer.json["versions"] == [1], answer.text
                assert await api.said("sql@stable") == said
            assert (await api.post(f"{one}/state", {"state": "deleted"})).json["versions"] == [1]
            answer = await api.post(f"{one}@1/state", {"state": "live"})
            assert answer.status == 404 and "was deleted" in answer.error["message"]
            assert (await api.get(f"{one}@1")).json["state"] == "deleted"
            log = (await api.get("/admin/v1/audit", key=ADMIN)).json
            kinds = ["delete", "restore", "retire", "alias", "publish"]
            assert [entry["kind"] for entry in log["entries"]] == kinds
            assert {entry["by"] for entry in log["entries"]} == {"acme/ci"}
            assert log["next_before"] is None

    in_admin(test)


def test_a_tar_of_a_folder_is_the_same_adapter_as_its_files(place: Place) -> None:
    async def test() -> None:
        async with administered(place) as api:
            files = await api.publish("acme", "a", form(place.peft))
            for name, options in (("b", ["-C", str(place.peft), "."]), ("c", place.file_names)):
                archive = place.tar(options)
                raw = await api.publish("acme", name, archive, content_type="application/x-tar")
                assert raw.json["digest"] == files.json["digest"], raw.text
            whole = await api.publish("acme", "d", {"x.tar": place.tar(place.file_names)})
            assert whole.json["digest"] == files.json["digest"], whole.text

    in_admin(test)


def test_what_is_published_and_moved_is_known_to_another_ingress_within_five_seconds(
    place: Place,
) -> None:
    """Each with a store of its own, by the real clock."""

    async def test() -> None:
        async with administered(place) as one, administered(place) as two:
            first = (await one.publish("acme", "sql", form(place.peft))).json["digest"]
            await one.post(f"{ADAPTERS}/acme/sql/aliases", {"alias": "stable", "version": 1})
            assert await two.said("sql@stable") == f"{first[:3]}:X"
            second = (await one.publish("acme", "sql", form(place.other))).json["digest"]
            await one.post(f"{ADAPTERS}/acme/sql/aliases", {"alias": "stable", "version": 2})
            loop = asyncio.get_running_loop()
            deadline = loop.time() + 5
            while await two.said("sql@stable") != f"{second[:3]}:X":
                assert loop.time() < deadline
                await asyncio.sleep(0.05)
            assert await two.said("sql") == f"{second[:3]}:X"

    in_admin(test)


def test_the_same_content_is_the_same_version_and_a_taken_name_can_be_refused(
    place: Place,
) -> None:
    async def test() -> None:
        async with administered(place) as api:
            for _ in range(2):
                assert (await api.publish("acme", "sql", form(place.peft))).json["version"] == 1
            taken = await api.publish("acme", "sql", form(place.other), query="?only_new=true")
            assert (taken.status, taken.error["code"]) == (409, "adapter_exists")
            assert (await api.publish("acme", "sql", form(place.other))).json["version"] == 2
            base = place.open().bases()[0]
            by_print = await api.publish("acme", "x", form(place.peft), query=f"?base={base[:9]}")
            assert by_print.json["base"] == base

    in_admin(test)


def test_lists_come_in_pages_and_with_filters(place: Place) -> None:
    async def test() -> None:
        async with administered(place) as api:
            for tenant, name in (("acme", "a"), ("acme", "b"), ("umbrella", "c")):
                await api.publish(tenant, name, form(place.peft), key=ADMIN)
            await api.post(f"{ADAPTERS}/acme/b/state", {"state": "retired"})
            assert await api.listed("", ADMIN) == ["acme/a@1", "umbrella/c@1"]
            assert await api.listed("limit=1&", ADMIN) == ["acme/a@1", "umbrella/c@1"]
            assert await api.listed("state=any&name=%3F&", ADMIN) == [
                *("acme/a@1", "acme/b@1", "umbrella/c@1")
            ]
            assert await api.listed("state=any&limit=1&", PUBLISH) == ["acme/a@1", "acme/b@1"]
            assert await api.listed("proof=failed&", ADMIN) == []
            for query, param in (
                *(("limit=0", "limit"), ("limit=1001", "limit"), ("state=x", "state")),
                *(("after=x", "after"), ("color=red", "color"), ("proof=maybe", "proof")),
                ("name=a&name=b", "name"),
            ):
                answer = await api.get(f"{ADAPTERS}?{query}", key=ADMIN)
                assert (answer.status, answer.error["param"]) == (400, param)
            first = (await api.get("/admin/v1/audit?limit=1", key=ADMIN)).json
            second = await api.get(f"/admin/v1/audit?before={first['next_before']}", key=ADMIN)
            numbers = [entry["number"] for entry in (*first["entries"], *second.json["entries"])]
            assert numbers == [4, 3, 2, 1]
            own = (await api.get("/admin/v1/audit")).json["entries"]
            assert {entry["tenant"] for entry in own} == {"acme"}

    in_admin(test)


def test_verification_says_how_far_it_is_and_what_is_damaged(place: Place) -> None:
    async def test() -> None:
        async with administered(place) as api:
            await api.publish("acme", "a", form(place.peft))
            digest = (await api.publish("acme", "b", form(place.other))).json["digest"]
            answer = await api.post("/admin/v1/verify", {})
            last = json.loads(answer.text.splitlines()[-1])
            assert (last["outcome"], last["num_adapters"], last["damage"]) == ("verified", 2, [])
            assert last["checked_bytes"] == last["total_bytes"] > 0
            weights = place.store_folder / "blobs" / digest / WEIGHTS_NAME
            weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
            answer = await api.post("/admin/v1/verify", {"name": "b"})
            last = json.loads(answer.text.splitlines()[-1])
            assert last["outcome"] == "damaged" and len(last["damage"]) == 1
            assert (await api.post("/admin/v1/verify", {"name": "z"})).status == 404

    in_admin(test)


# ---- rights --------------------------------------------------------------------------------


def test_each_key_opens_what_it_is_for_and_nothing_else(place: Place) -> None:
    async def test() -> None:
        async with administered(place) as api:
            routes = [r for r in api.server.api.routes if isinstance(r, ApiRoute)]
            admin_routes = [r for r in routes if r.doc.needs_admin_key]
            assert len(admin_routes) == 8
            for route in admin_routes:
                path = route.path.format(tenant="acme", adapter="sql", alias="prod")
                for key, status in (
                    (None, 401),
                    ("reef-wrong", 401),
                    (ACME, 403),
                    (PROMETHEUS, 403),
                ):
                    answer = await api.call(route.method, path, {}, key)
                    assert answer.status == status, (route.method, path)
            for key in (PUBLISH, ADMIN):
                assert (await api.get("/v1/models", key=key)).status == 401
                assert (await api.get("/metrics", key=key)).status == 401
            for method, path in (
                ("GET", f"{ADAPTERS}/umbrella/sql"),
                ("POST", f"{ADAPTERS}/umbrella/sql/state"),
                ("POST", f"{ADAPTERS}/umbrella/sql/aliases"),
                ("GET", f"{ADAPTERS}?tenant=umbrella"),
                ("GET", f"{ADAPTERS}?after=umbrella/a@1"),
                ("GET", "/admin/v1/audit?tenant=umbrella"),
            ):
                answer = await api.call(method, path, {"state": "deleted"}, PUBLISH)
                assert (answer.status, answer.error["code"]) == (403, "permission_denied"), path
            answer = await api.post("/admin/v1/verify", {"tenant": "umbrella"})
            assert answer.status == 403
            answer = await api.publish("umbrella", "sql", form(place.peft), key=PUBLISH)
            assert answer.status == 403 and place.left_behind() == []
            assert await api.said("sql", key=UMBRELLA) == "404"

    in_admin(test)


def test_no_key_and_no_hash_of_one_is_in_the_store(place: Place) -> None:
    async def test() -> None:
        async with administered(place) as api:
            await api.publish("acme", "sql", form(place.peft), key=PUBLISH)
            await api.post(f"{ADAPTERS}/acme/sql/state", {"state": "retired"}, key=ADMIN)
        stored = b"".join(path.read_bytes() for path in place.store_folder.rglob("*.json"))
        assert b"acme/ci" in stored and b"admin ann" in stored
        for secret in place.secrets():
            assert secret.encode() not in stored

    in_admin(test)


def test_the_api_is_off_unless_it_is_wanted_and_needs_keys(place: Place) -> None:
    async def test() -> None:
        async with administered(place, is_on=False) as api:
            assert (await api.get(ADAPTERS, key=ADMIN)).status == 404

    in_admin(test)
    args: dict[str, Any] = {"models": [{"id": "m", "source": "m"}]}
    assert load_config(args).admin.enabled is False
    with pytest.raises(ConfigError, match=r"admin\.enabled: only where tenancy\.mode is keys"):
        load_config({**args, "admin": {"enabled": True}})
    keys = {"mode": "keys", "keys_file": "keys.yaml"}
    on = load_config(
        {**args, "admin": {"enabled": True, "max_upload_bytes": "1MiB"}, "tenancy": keys}
    )
    assert on.admin.max_upload_bytes == 2**20


# ---- from other places -----------------------------------------------------------------------


def test_places_that_answer_slowly_hold_up_nobodys_upload(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_go_on = threading.Event()

    def slow(*_: Any) -> None:
        may_go_on.wait(20)
        raise invalid("It is not there.", "source")

    monkeypatch.setattr("deployments.ingress.admin.fetch", slow)

    async def test() -> None:
        async with administered(place, publish_from=["hf://acme"]) as api:
            source = {"source": "hf://acme/slow"}
            fetched = [
                asyncio.create_task(api.post(f"{ADAPTERS}/acme/{name}", source)) for name in "ab"
            ]
            while api.admin is None or api.admin.num_uploads < 2:
                await asyncio.sleep(0.001)
            uploaded = await api.publish("umbrella", "sql", form(place.peft), ADMIN)
            assert uploaded.status == 200 and not any(task.done() for task in fetched)
            may_go_on.set()
            assert [answer.status for answer in await asyncio.gather(*fetched)] == [400, 400]

    in_admin(test)


def test_an_adapter_is_published_from_an_allowed_place_and_from_a_version(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(hub: FakeHub) -> None:
        url = f"hf://{REPOSITORY}"
        async with administered(place, publish_from=["hf://acme", "s3://b/ok/"]) as api:
            one = await api.post(f"{ADAPTERS}/acme/sql", {"source": f"{url}@v1"})
            assert one.json["version"] == 1 and place.left_behind() == []
            assert (await api.post(f"{ADAPTERS}/acme/sql", {"source": url})).json["version"] == 1
            copy = await api.post(f"{ADAPTERS}/acme/copy?only_new=true", {"source": "sql@1"})
            assert copy.json["digest"] == one.json["digest"]
            mine = await api.post(f"{ADAPTERS}/umbrella/sql", {"source": "acme/copy@latest"}, ADMIN)
            assert (mine.json["digest"], mine.json["published_by"]) == (
                one.json["digest"],
                "admin ann",
            )
            hub.said_sizes = {WEIGHTS_NAME: 3 * 2**30}
            refused = [
                ({"source": "hf://acme@main"}, 400, "must be hf://organisation/name@revision"),
                ({"source": "hf://evil/x"}, 400, "below none of the prefixes"),
                ({"source": "s3://b/okay"}, 400, "below none of the prefixes"),
                ({"source": "s3://b/ok/../secret"}, 400, "below none of the prefixes"),
                ({"source": "file:///etc"}, 400, "below none of the prefixes"),
                ({"source": "http://169.254.169.254/"}, 400, "below none of the prefixes"),
                ({"source": f"{url}@absent"}, 400, "no such repository or revision"),
                ({"source": url}, 400, "more than the 2147483648 allowed"),
                ({"source": "sql@7"}, 404, "no live adapter 'sql@7'"),
                ({"source": "umbrella/sql@1"}, 403, "not those of 'umbrella'"),
                ({"source": "/etc/passwd"}, 403, "not those of ''"),
                ({"source": "sql@1", "more": 1}, 400, "more"),
            ]
            for body, status, reason in refused:
                answer = await api.post(f"{ADAPTERS}/acme/new", body)
                assert (answer.status, reason in answer.text) == (status, True), answer.text
            taken = await api.post(f"{ADAPTERS}/acme/sql?only_new=true", {"source": "copy@1"})
            assert taken.status == 409
            monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
            gone = await api.post(f"{ADAPTERS}/acme/new", {"source": url})
            assert (gone.status, "127.0.0.1" in gone.text) == (502, False)
            assert place.left_behind() == []
        async with administered(place) as api:
            off = await api.post(f"{ADAPTERS}/acme/new", {"source": url})
            assert (off.status, off.error["param"]) == (400, "source")

    with running_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        hub.commit(place.peft)
        hub.commit(place.peft, "v1")
        in_admin(lambda: test(hub))


@pytest.mark.parametrize("prefix", ["s3://", "http://host/", "hf://org/name@main", "/srv", ""])
def test_a_prefix_that_is_no_bucket_and_no_organisation_is_refused(prefix: str) -> None:
    with pytest.raises(ConfigError, match="neither s3://bucket/prefix nor hf://organisation"):
        load_config({"models": [{"id": "m", "source": "m"}], "admin": {"publish_from": [prefix]}})


# ---- limits --------------------------------------------------------------------------------


def test_a_tenants_limits_are_named_with_their_values(place: Place, tmp_path: Path) -> None:
    limits = {"max_upload_bytes": 20_000, "max_lora_rank": 3, "max_adapters": 1}

    async def test() -> None:
        async with administered(place, limits={"max_adapters": 1}) as api:
            assert (await api.publish("acme", "a", form(place.peft))).status == 200
            full = await api.publish("acme", "b", form(place.other))
            assert (full.status, full.error["code"]) == (409, "limit_exceeded")
            assert "has 1 live versions, and the limit is 1 (max_adapters)" in full.error["message"]
            again = await api.publish("acme", "a", form(place.peft))
            assert (again.status, again.json["version"]) == (200, 1), "it takes no room"
            more = await api.publish("acme", "a", form(place.other))
            assert (more.status, more.error["code"]) == (409, "limit_exceeded")
            assert (await api.publish("other", "b", form(place.other), key=ADMIN)).status == 200
            assert place.left_behind() == []
        for name in ("log", "blobs"):
            shutil.rmtree(place.store_folder / name)
        async with administered(place, limits=limits) as api:
            high = await api.publish("acme", "a", form(place.peft))
            assert (high.status, high.error["code"]) == (400, "limit_exceeded")
            assert "its rank 4 is above the limit of 3 (max_lora_rank)" in high.error["message"]
            wide = changed(place.peft, tmp_path / "wide")
            (wide / "tokenizer.json").write_bytes(b" " * 30_000)
            large = await api.publish("acme", "a", form(wide))
            assert (large.status, large.error["code"]) == (413, "request_too_large")
            assert "above the limit of 20000 (max_upload_bytes)" in large.error["message"]
            assert place.left_behind() == [] and place.open().list() == ()

    in_admin(test)
