"""Aliases of several versions over HTTP: who gets which, what is waited for, what is concluded."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adapter_store.aliases import AliasView
from adapter_store.names import AdapterRef
from deployments.ingress.feedback import MAX_AGE_S, Feedback
from deployments.ingress.flips import Flips
from deployments.ingress.metrics import Metrics
from engine.messages import EngineStats, GenerateRequest
from tests.deployments.support.admin import (
    ADAPTERS,
    ADMIN,
    Api,
    Place,
    administered,
    form,
    in_admin,
    made_place,
)
from tests.deployments.support.fakes import EOS, FakeEngine, encode, until
from tests.deployments.support.keys import ACME, UMBRELLA

SQL = f"{ADAPTERS}/acme/sql"
QUICK = {"candidate": 2, "max_regression": 0.2, "max_length_change": 0.3, "min_requests": 20}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_place(tmp_path_factory.mktemp("made"))


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Place:
    return Place(made, tmp_path)


async def two_versions(api: Api, place: Place) -> list[str]:
    """Publish them, and make sql@prod mean the first; return their digests."""
    answers = [await api.publish("acme", "sql", form(each)) for each in (place.peft, place.other)]
    await shared(api, {"version": 1})
    return [answer.json["digest"] for answer in answers]


async def shared(api: Api, body: dict[str, Any]) -> dict[str, Any]:
    answer = await api.post(f"{SQL}/aliases", {"alias": "prod", **body})
    return answer.json


async def state(api: Api) -> dict[str, Any]:
    return (await api.get(f"{SQL}/aliases/prod")).json


async def audit(api: Api) -> list[dict[str, Any]]:
    return (await api.get("/admin/v1/audit?tenant=acme")).json["entries"]


async def asked(
    api: Api, session: str = "", model: str = "sql@prod", **body: Any
) -> tuple[int, dict[str, Any], str]:
    """Return the status, the body and the version of the header."""
    headers = {"authorization": f"Bearer {ACME}"}
    headers |= {"x-session-id": session} if session else {}
    sent = {"model": model, "prompt": "x", "max_tokens": 8, **body}
    url = f"{api.url}/v1/completions"
    async with api.session.post(url, json=sent, headers=headers) as answer:
        return answer.status, await answer.json(), answer.headers.get("x-reef-version", "")


async def versions(api: Api, sessions: Sequence[str], **body: Any) -> list[int]:
    """Ask for each session; the header, the answer's model and its text must agree."""
    found: list[int] = []
    for session in sessions:
        status, answer, header = await asked(api, session, **body)
        assert status == 200, answer
        found.append(int(header.rpartition("@")[2]))
        assert answer["model"] in ("sql@prod", f"sql@{found[-1]}")
    return found


def test_sessions_share_an_alias_and_each_keeps_its_version(place: Place) -> None:
    async def test() -> None:
        async with administered(place) as api, administered(place, writer="b") as other:
            digests = await two_versions(api, place)
            said = await shared(api, {"versions": {"1": 75, "2": 25}})
            assert (said["version"], said["versions"]) == (1, {"1": 75, "2": 25})
            assert said["before"] == {"1": 1} and said["trial"] is said["figures"] is None
            names = [f"session {number}" for number in range(40)]
            first = await versions(api, names)
            assert 4 <= first.count(2) <= 18 and first == await versions(other, names)
            await shared(api, {"versions": {"1": 25, "2": 75}})
            second = await versions(api, names)
            assert all(new >= old for old, new in zip(first, second, strict=True))
            by_user = [(await asked(api, user=f"u{n}"))[2] for n in range(12) for _ in range(2)]
            assert by_user[::2] == by_user[1::2] and len(set(by_user)) == 2
            alone = {(await asked(api))[2] for _ in range(40)}
            assert len(alone) == 2, "without a session or a user each request is one of its own"
            _, answer, header = await asked(api, names[0], model="sql@2")
            assert (answer["model"], header) == ("sql@2", "acme/sql@2")
            assert answer["choices"][0]["text"].startswith(digests[1][:3])

    in_admin(test)


def test_what_is_wrong_with_shares_is_a_400_that_names_it(place: Place) -> None:
    async def test() -> None:
        async with administered(place) as api:
            await two_versions(api, place)
            for body, words in (
                ({"versions": {"1": 0}}, "must not all be 0"),
                ({"versions": {"1": 1, "02": 1}}, "02"),
                ({"versions": {"1": 1}, "version": 1}, "one of version and versions"),
                ({}, "one of version and versions"),
                ({"versions": {"1": 1, "2": 1}, "trial": {"candidate": 3}}, "candidate 3"),
                ({"versions": {"1": 1, "2": 1}, "trial": {"candidate": 2, "alpha": 2}}, "alpha"),
                ({"versions": {"1": 1, "2": 1}, "trial": {"canary": 2}}, "trial."),
            ):
                answer = await api.post(f"{SQL}/aliases", {"alias": "prod", **body})
                assert answer.status == 400 and words in answer.error["message"], answer.text
            answer = await api.post(f"{SQL}/aliases", {"alias": "p", "versions": {"1": 1, "9": 1}})
            assert answer.status == 404
            assert (await api.get(f"{SQL}/aliases/none")).status == 404
            assert (await state(api))["versions"] == {"1": 1}

    in_admin(test)


# ---- residency -----------------------------------------------------------------------------


def resident(engine: FakeEngine, *digests: str) -> None:
    engine.totals = replace(EngineStats(), adapters_in_memory=digests)


async def loaded(api: Api, engine: FakeEngine, digest: str) -> None:
    """Have the first version answer, and the ingress know that its replica has it."""
    assert (await asked(api, "s"))[0] == 200
    resident(engine, digest)
    link = api.server.link
    await until(lambda: link.holders([digest]) == ["replica"])


def test_an_alias_flips_when_the_new_version_is_resident_where_the_old_one_is(
    place: Place,
) -> None:
    async def test() -> None:
        engine = FakeEngine()
        async with administered(place, engine=engine) as api:
            digests = await two_versions(api, place)
            await loaded(api, engine, digests[0])
            engine.held.add(digests[1])
            await shared(api, {"version": 2})
            for _ in range(3):
                assert (await versions(api, ["s"])) == [1], "it is being loaded"
                await asyncio.sleep(0.02)
            in_flight = asyncio.ensure_future(asked(api, "s", max_tokens=60, ignore_eos=True))
            await asyncio.sleep(0)
            engine.held.clear()
            while (await versions(api, ["s"])) == [1]:
                await asyncio.sleep(0.01)
            assert (await in_flight)[2] == "acme/sql@1"
            while (found := await state(api))["flip"] is None:
                await asyncio.sleep(0.01)
            assert found["flip"] == "resident"
            [noted] = [entry for entry in await audit(api) if entry["kind"] == "flip"]
            assert noted["details"]["replicas"] == 1 and noted["details"]["waited_s"] >= 0.04

    in_admin(test)


def test_a_version_that_takes_too_long_is_flipped_to_and_the_audit_log_says_so(
    place: Place,
) -> None:
    async def test() -> None:
        engine = FakeEngine()
        async with administered(place, engine=engine, wait_s=0.1) as api:
            digests = await two_versions(api, place)
            await loaded(api, engine, digests[0])
            engine.held.add(digests[1])
            await shared(api, {"version": 2})
            assert (await versions(api, ["s"])) == [1]
            await asyncio.sleep(0.2)
            late = asyncio.ensure_future(asked(api, "s"))
            while (await state(api))["flip"] != "late":
                await asyncio.sleep(0.01)
            engine.held.clear()
            assert (await late)[2] == "acme/sql@2"

    in_admin(test)


@pytest.mark.parametrize("is_trial", [False, True], ids=["moved", "canary"])
def test_a_version_that_cannot_be_loaded_is_never_flipped_to(place: Place, is_trial: bool) -> None:
    async def test() -> None:
        engine = FakeEngine()
        async with administered(place, engine=engine) as api:
            digests = await two_versions(api, place)
            await loaded(api, engine, digests[0])
            engine.refused[digests[1]] = "its proof failed"
            both = {"versions": {"1": 50, "2": 50}, "trial": {"candidate": 2}}
            await shared(api, both if is_trial else {"version": 2})
            while (await state(api))["versions"] != {"1": 1}:
                assert set(await versions(api, ["a", "b", "c", "d"])) == {1}
            because = (await audit(api))[0]["details"]["because"]
            assert (because["outcome"], because["version"]) == ("roll back", 2)
            assert because["why"] == "it cannot be loaded: its proof failed"
            assert set(await versions(api, ["a", "b", "c", "d"])) == {1}

    in_admin(test)


def test_a_version_that_fails_at_a_replica_after_the_flip_sets_the_alias_back(
    place: Place,
) -> None:
    async def test() -> None:
        engine = FakeEngine()
        async with administered(place, engine=engine) as api:
            digests = await two_versions(api, place)
            engine.refused[digests[1]] = "no kernel computes it"
            await shared(api, {"version": 2})
            assert (await asked(api))[0] == 400, "nothing was resident, so nothing was waited for"
            while (await state(api))["versions"] != {"1": 1}:
                await asyncio.sleep(0.01)
            assert set(await versions(api, ["a", "b"])) == {1}

    in_admin(test)


def test_what_fails_of_an_earlier_move_sets_the_latest_one_not_back() -> None:
    class Nothing:
        def holders(self, _: Any) -> list[str]:
            return []

        def share(self, *_: Any, **__: Any) -> bool:
            raise AssertionError("the alias is set back")

    three, five, six = (AdapterRef("acme", "sql", n, f"{n}" * 64, "base") for n in (3, 5, 6))

    def moved(record: int, to: AdapterRef, before: AdapterRef) -> AliasView:
        shares, earlier = [(to, 1.0)], [(before, 1.0)]
        return AliasView("acme", "sql", "prod", record, shares, earlier, None, 0, "", time.time())

    async def test() -> None:
        flips, link = Flips(Nothing()), Nothing()  # type: ignore[arg-type]
        old, new = moved(10, five, three), moved(20, six, five)
        flips.shares(old, link)  # type: ignore[arg-type]
        flips.shares(new, link)  # type: ignore[arg-type]
        flips.fail(old, five, "it has no proof")
        assert flips.shares(new, link) == [(six, 1.0)]  # type: ignore[arg-type]
        await flips.close()

    asyncio.run(test())


# ---- trials --------------------------------------------------------------------------------


def without_end(digest: str) -> Any:
    """Answers of this adapter never end by themselves."""

    def answer(request: GenerateRequest) -> list[int]:
        folder = request.adapter_folder
        is_it = folder is not None and folder.digest == digest
        return encode("aaaaaaaaaa") if is_it else [*encode("bbbbbbb"), EOS]

    return answer


async def ask_until_concluded(api: Api, others: Sequence[Api], most: int) -> int:
    """Ask in new sessions, all ingresses in turn; return how many answers there were."""
    number = 0
    while (await state(api))["trial"] is not None:
        assert number < most, (await state(api))["figures"]
        for _ in range(10):
            which = (api, *others)[number % (1 + len(others))]
            assert (await asked(which, f"session {number}"))[0] == 200
            number += 1
        await asyncio.sleep(0.01)
    return number


def test_a_canary_with_a_planted_regression_is_rolled_back_by_itself(place: Place) -> None:
    """Each of two ingresses has seen half of it; one of them acts, once."""

    async def test() -> None:
        async with administered(place) as api, administered(place, writer="b") as other:
            digests = await two_versions(api, place)
            for each in (api, other):
                each.server.engine.answer = without_end(digests[1])
            await shared(api, {"versions": {"1": 60, "2": 40}, "trial": {"candidate": 2}})
            await state(other)  # so that it knows of the trial
            await ask_until_concluded(api, [other], most=150)
            assert (await state(api))["versions"] == {"1": 1}
            await state(other)
            entries = [e for e in await audit(api) if "because" in e["details"]]
            assert [e["by"] for e in entries] == ["an ingress"]
            because = entries[0]["details"]["because"]
            assert because["outcome"] == "roll back" and because["why"].startswith(
                "cut rose from 0"
            )
            assert because["candidate"]["cut"] == 1 and because["candidate"]["requests"] <= 40
            assert because["candidate"]["stop_reasons"] == {
                "length": because["candidate"]["requests"]
            }
            assert because["stable"]["stop_reasons"].keys() == {"stop"}
            assert set(await versions(other, [f"late {n}" for n in range(10)])) == {1}
            await until(lambda: not list((place.store_folder / "trials").rglob("*.json")))

    in_admin(test)


def test_a_canary_without_one_is_promoted(place: Place) -> None:
    async def test() -> None:
        async with administered(place) as api:
            await two_versions(api, place)
            await shared(api, {"versions": {"1": 1, "2": 1}, "trial": QUICK})
            await ask_until_concluded(api, [], most=200)
            assert (await state(api))["versions"] == {"2": 1}
            because = (await audit(api))[0]["details"]["because"]
            assert because["outcome"] == "promote" and because["why"].startswith("no regression in")

    in_admin(test)


def test_a_canary_that_is_disliked_is_rolled_back(place: Place) -> None:
    async def test() -> None:
        async with administered(place) as api:
            await two_versions(api, place)
            await shared(api, {"versions": {"1": 1, "2": 1}, "trial": {"candidate": 2}})
            for number in range(60):
                _, answer, header = await asked(api, f"session {number}")
                score = {"id": answer["id"], "score": 0 if header.endswith("2") else 1}
                assert (await api.post("/v1/feedback", score, ACME)).json["counted"] is True
            while (found := await state(api))["trial"] is not None:
                await asyncio.sleep(0.01)
            assert found["versions"] == {"1": 1}
            because = (await audit(api))[0]["details"]["because"]
            assert because["why"] == "disliked rose from 0.0000 to 1.0000"

    in_admin(test)


def test_the_same_name_republished_under_load_never_mixes_versions(place: Place) -> None:
    """The alias moves back and forth while streams run; each text is that of its header."""

    async def test() -> None:
        async with administered(place) as api:
            digests = await two_versions(api, place)
            prefixes = {f"acme/sql@{n + 1}": digest[:3] for n, digest in enumerate(digests)}
            seen: set[str] = set()

            async def client(number: int) -> None:
                for turn in range(15):
                    _, answer, header = await asked(api, f"{number} {turn}")
                    assert answer["choices"][0]["text"].startswith(prefixes[header])
                    seen.add(header)

            async def mover() -> None:
                for turn in range(8):
                    weights = {"1": 1 + turn % 3, "2": 1 + turn % 2}
                    await shared(api, {"versions": weights} if turn % 2 else {"version": 2})
                    await asyncio.sleep(0.01)

            await asyncio.gather(mover(), *(client(number) for number in range(6)))
            assert seen == prefixes.keys()

    in_admin(test)


# ---- feedback ------------------------------------------------------------------------------


def test_feedback_counts_once_for_the_version_that_answered_its_tenant(place: Place) -> None:
    async def test() -> None:
        async with administered(place) as api:
            await two_versions(api, place)
            headers = {"authorization": f"Bearer {ACME}", "x-request-id": "mine"}
            body = {"model": "sql@2", "prompt": "x"}
            answer = await api.call(
                "POST", "/v1/completions", body, None, headers=headers, json=body
            )
            scored = {"request_id": "mine", "score": 0.5, "comment": "so so\n"}
            for key in (UMBRELLA, ADMIN):
                refused = await api.post("/v1/feedback", scored, key)
                assert refused.status == (404 if key == UMBRELLA else 401)
            given = await api.post("/v1/feedback", scored, ACME)
            assert given.json == {"id": "mine", "counted": True}
            again = await api.post("/v1/feedback", {"id": answer.json["id"], "score": 1}, ACME)
            assert again.json["counted"] is False, "it is the same answer"
            for wrong in ({"score": 1}, {"id": "a", "score": 2}, {"id": "a", "score": None}):
                assert (await api.post("/v1/feedback", wrong, ACME)).status == 400
            unknown = await api.post("/v1/feedback", {"id": "nobody's", "score": 1}, ACME)
            assert (unknown.status, unknown.error["code"]) == (404, "answer_not_found")
            text = (await api.server.metrics.render({})).decode()
            assert 'reef_feedback_total{adapter="acme/sql@2"} 1' in text
            assert 'reef_good_feedback_total{adapter="acme/sql@2"} 0.5' in text

    in_admin(test)


def test_answers_are_remembered_for_a_time_and_in_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.ingress.feedback.MAX_ANSWERS", 2)
    now = 0.0
    feedback = Feedback(Metrics(10), clock=lambda: now)
    for number in range(3):
        feedback.remember("t", [f"{number}a", f"{number}b"], "t/x@1")
    assert feedback.take("t", "0a", 1, "") is None
    assert feedback.take("t", "2a", 1, "") is True
    assert feedback.take("t", "2b", 1, "") is False
    now = MAX_AGE_S + 1
    assert feedback.take("t", "1a", 1, "") is None
