"""Uploads that go wrong: each is an error or nothing, and neither the disk nor the store keeps any
of it. Over real HTTP, where bytes can be left out."""

import asyncio
import json
import shutil
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from adapter_store.layout import WEIGHTS_NAME
from adapter_store.peft_config import CONFIG_NAME
from deployments.ingress import uploads
from deployments.ingress.admin import MAX_UPLOADS_OF_TENANT
from deployments.ingress.http_errors import ApiError
from deployments.ingress.upload_folders import UploadFolders
from tests.adapter_store.adapters import changed
from tests.deployments.support.admin import (
    ADAPTERS,
    PUBLISH,
    TAR,
    Api,
    Place,
    administered,
    form,
    in_admin,
)
from tests.deployments.support.fakes import until

BOUNDARY = "cut-here"
FORM = f"multipart/form-data; boundary={BOUNDARY}"


def part(file_name: str, content: bytes) -> bytes:
    disposition = f'Content-Disposition: form-data; name="file"; filename="{file_name}"'
    return f"--{BOUNDARY}\r\n{disposition}\r\n\r\n".encode() + content + b"\r\n"


def body_of(files: dict[str, bytes]) -> bytes:
    parts = b"".join(part(name, content) for name, content in files.items())
    return parts + f"--{BOUNDARY}--\r\n".encode()


def cuts_of(body: bytes) -> dict[str, int]:
    """One position in each class of bytes of a form of two files."""
    second = body.index(f"--{BOUNDARY}".encode(), 1)
    last = body.rindex(f"--{BOUNDARY}--".encode())
    content = body.index(b"\r\n\r\n")
    return {
        "no byte": 0,
        "the first boundary": 4,
        "the first head": content - 10,
        "between head and content": content + 2,
        "the first content": content + 20,
        "before the second boundary": second,
        "the second boundary": second + 4,
        "the second head": second + 40,
        "the second content": (second + last) // 2,
        "the last byte of content": last - 3,
        "before the last boundary": last,
        "the last boundary": last + 4,
        "its last hyphen": len(body) - 3,
    }


@asynccontextmanager
async def half_sent(
    api: Api, body: bytes, announced: int, name: str = "sql", kind: str = FORM
) -> AsyncIterator[asyncio.StreamReader]:
    """Send a head and some of the body; hang up at the end of the block."""
    host, _, port = api.url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = (
        f"POST {ADAPTERS}/acme/{name} HTTP/1.1\r\nHost: {host}\r\n"
        f"Authorization: Bearer {PUBLISH}\r\n"
        f"Content-Type: {kind}\r\nContent-Length: {announced}\r\nConnection: close\r\n\r\n"
    )
    writer.write(head.encode() + body)
    await writer.drain()
    try:
        yield reader
    finally:
        writer.close()


def is_idle(api: Api) -> bool:
    assert api.admin is not None
    return api.admin.num_uploads == 0


async def check_nothing_is_left(api: Api, place: Place, what: str = "") -> None:
    await until(lambda: is_idle(api))
    assert place.left_behind() == [], what
    assert place.open().list() == (), what


# ---- cut -----------------------------------------------------------------------------------


def test_a_client_that_hangs_up_at_any_byte_leaves_nothing(place: Place) -> None:
    body = body_of(form(place.peft))

    async def test() -> None:
        async with administered(place) as api:
            for what, cut in cuts_of(body).items():
                async with half_sent(api, body[:cut], len(body)):
                    await until(lambda: not is_idle(api))
                    await asyncio.sleep(0.005)  # the server takes what came
                await check_nothing_is_left(api, place, what)
            assert (await api.publish("acme", "sql", body, content_type=FORM)).status == 200

    in_admin(test)


def test_a_body_that_ends_at_any_byte_is_refused_and_leaves_nothing(place: Place) -> None:
    body, archive = body_of(form(place.peft)), place.tar(place.file_names)
    size = (place.peft / CONFIG_NAME).stat().st_size
    second = 512 + (size + 511) // 512 * 512
    tar_cuts = {"tar: nothing": 0, "tar: a head": 100, "tar: content": 600, "tar: a file": second}
    tar_cuts |= {"tar: the second head": second + 100, "tar: weights": second + 3000}

    async def test() -> None:
        async with administered(place) as api:
            cases = [(what, body[:cut], FORM) for what, cut in cuts_of(body).items()]
            cases += [(what, archive[:cut], TAR) for what, cut in tar_cuts.items()]
            for what, raw, kind in cases:
                answer = await api.publish("acme", "sql", raw, content_type=kind)
                assert answer.status == 400, (what, answer.text)
                assert str(place.folder) not in answer.text
                await check_nothing_is_left(api, place, what)

    in_admin(test)


def held_publication(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> tuple[threading.Event, threading.Event]:
    """Let publishing wait; return what says that it has begun, and what lets it go on."""
    assert api.admin is not None
    begun, may_go_on = threading.Event(), threading.Event()
    publish = api.admin.store.publish

    def slow(*given: Any, **named: Any) -> Any:
        begun.set()
        assert may_go_on.wait(10)
        return publish(*given, **named)

    monkeypatch.setattr(api.admin.store, "publish", slow)
    return begun, may_go_on


def test_a_client_that_hangs_up_while_its_adapter_is_published_has_published_it(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = body_of(form(place.peft))

    async def test() -> None:
        async with administered(place) as api:
            begun, may_go_on = held_publication(api, monkeypatch)
            async with half_sent(api, body, len(body)):
                await until(begun.is_set)
            may_go_on.set()
            await until(lambda: is_idle(api))
            assert [record.name for record in place.open().list()] == ["sql"]
            assert place.left_behind() == []

    in_admin(test)


@pytest.mark.parametrize("num_sent", [700, None], ids=["amid the body", "behind its end"])
def test_a_server_that_cancels_a_request_leaves_all_or_nothing(
    place: Place, num_sent: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray Serve does so for a client that has gone."""
    body = body_of(form(place.peft))

    async def test() -> None:
        async with administered(place) as api:
            begun, may_go_on = held_publication(api, monkeypatch)
            parts = [body[:num_sent]]

            async def receive() -> dict[str, Any]:
                if parts:
                    more = num_sent is not None
                    return {"type": "http.request", "body": parts.pop(), "more_body": more}
                await asyncio.Event().wait()
                raise AssertionError("cancelled before")

            async def send(message: Any) -> None:
                raise AssertionError(f"an answer: {message}")

            headers = [(b"authorization", f"Bearer {PUBLISH}".encode()), (b"content-type", FORM)]
            scope = {
                "type": "http",
                "method": "POST",
                "path": f"{ADAPTERS}/acme/sql",
                "query_string": b"",
                "headers": [(k, v if isinstance(v, bytes) else v.encode()) for k, v in headers],
            }
            call = asyncio.ensure_future(api.server.api(scope, receive, send))
            await until(lambda: not is_idle(api) and not parts)
            if num_sent is None:
                await until(begun.is_set)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            may_go_on.set()
            await until(lambda: is_idle(api))
            assert place.left_behind() == []
            assert len(place.open().list()) == (num_sent is None)

    in_admin(test)


def test_an_upload_that_goes_silent_is_ended(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "SILENCE_S", 0.05)
    body = body_of(form(place.peft))

    async def test() -> None:
        async with administered(place) as api:
            async with half_sent(api, body[:700], len(body)) as reader:
                answer = (await reader.read()).decode()
            assert " 408 " in answer and "no byte came for" in answer
            await check_nothing_is_left(api, place)

    in_admin(test)


# ---- wrong ---------------------------------------------------------------------------------


def test_an_upload_without_an_end_is_stopped_at_the_limit(place: Place) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        yield part(WEIGHTS_NAME, b"")[:-2]
        while True:
            sent += 2**16
            yield b"x" * 2**16
            await asyncio.sleep(0)

    async def test() -> None:
        async with administered(place, limits={"max_upload_bytes": 2**21}) as api:
            headers = {"content-type": FORM}
            path = f"{ADAPTERS}/acme/sql"
            try:
                answer = await api.call("POST", path, data=endless(), headers=headers)
                assert answer.status == 413 and str(2**21) in answer.error["message"]
            except ConnectionError:  # the server need not read on to answer
                pass
            assert 2**21 <= sent < 2**24
            await check_nothing_is_left(api, place)
            async with half_sent(api, b"", 2**21 + 1) as reader:
                answered = (await reader.read()).decode()
            assert " 413 " in answered and f"has {2**21 + 1} bytes, above the limit" in answered

    in_admin(test)


def bad_forms() -> dict[str, tuple[bytes, str]]:
    """Bodies and words of the answers."""
    config = part(CONFIG_NAME, b"{}")
    end = f"--{BOUNDARY}--\r\n".encode()
    field = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="color"\r\n\r\nred\r\n'.encode()
    no_name = f"--{BOUNDARY}\r\nContent-Type: text/plain\r\n\r\nx\r\n".encode()
    many_heads = f"--{BOUNDARY}\r\n".encode() + b"X-A: b\r\n" * 100 + b"\r\nx\r\n"
    return {
        "a field": (field + end, "The field 'color' is not known"),
        "no name": (no_name + end, "The field '' is not known"),
        "a path": (part(f"../{CONFIG_NAME}", b"{}") + end, "is not one of the files that are used"),
        "an absolute path": (part("/x.json", b"{}") + end, "is not one of the files"),
        "an unused file": (config + part("README.md", b"x") + end, "'README.md' is not one of"),
        "a file twice": (config + config + end, "has adapter_config.json twice"),
        "archive and file": (part("x.tar", b"") + config + end, "files or one archive"),
        "two archives": (part("x.tar", b"") + part("y.tar", b"") + end, "has archive.tar twice"),
        "no files": (end, "cannot be read|no adapter_config.json"),
        "no form": (b"hello", "The form cannot be read"),
        "many heads": (many_heads + end, "The form cannot be read"),
        "no weights": (config + end, "adapter_model.safetensors|peft_type"),
        "no JSON": (part(CONFIG_NAME, b"{") + part(WEIGHTS_NAME, b"") + end, "adapter_config.json"),
    }


def test_what_is_no_adapter_is_refused_with_the_reason(place: Place, tmp_path: Path) -> None:
    """All on one server: each must leave it as it was."""

    async def test() -> None:
        async with administered(place) as api:
            for what, (raw, words) in bad_forms().items():
                answer = await api.publish("acme", "sql", raw, content_type=FORM)
                assert answer.status == 400, (what, answer.text)
                found = answer.error["message"]
                assert any(word in found for word in words.split("|")), (what, found)
            strange = changed(place.peft, tmp_path / "strange", {"target_modules": ["qkv"]})
            wrong_base = {**form(place.peft), CONFIG_NAME: (strange / CONFIG_NAME).read_bytes()}
            answer = await api.publish("acme", "sql", wrong_base)
            assert (answer.status, answer.error["code"]) == (400, "adapter_invalid")
            assert str(place.folder) not in answer.text
            for kind, status in (("text/plain", 415), ("multipart/form-data", 400), ("", 415)):
                answer = await api.publish("acme", "sql", b"x", content_type=kind)
                assert answer.status == status, kind
            for query, status in (("?base=nobody", 400), ("?color=red", 400), ("?only_new=1", 400)):
                answer = await api.publish("acme", "sql", form(place.peft), query=query)
                assert answer.status == status, answer.text
            answer = await api.publish("acme", "no%20name", form(place.peft))
            assert answer.status == 400 and "does not match" in answer.error["message"]
            links = place.tar(["-C", str(linked(tmp_path, place)), CONFIG_NAME, WEIGHTS_NAME])
            answer = await api.publish("acme", "sql", links)
            assert answer.status == 400 and "has a link" in answer.error["message"]
            await check_nothing_is_left(api, place)

    in_admin(test)


def linked(folder: Path, place: Place) -> Path:
    (folder / "linked").mkdir()
    shutil.copy(place.peft / CONFIG_NAME, folder / "linked")
    (folder / "linked" / WEIGHTS_NAME).symlink_to(place.peft / WEIGHTS_NAME)
    return folder / "linked"


# ---- the server's own ----------------------------------------------------------------------


def test_a_tenant_has_few_uploads_at_a_time_and_others_theirs(place: Place) -> None:
    body = body_of(form(place.peft))

    async def test() -> None:
        async with administered(place) as api:
            assert MAX_UPLOADS_OF_TENANT == 2
            async with half_sent(api, body[:50], len(body)), half_sent(api, body[:50], len(body)):
                await until(lambda: api.admin is not None and api.admin.num_uploads == 2)
                answer = await api.publish("acme", "sql", form(place.peft))
                assert (answer.status, answer.error["code"]) == (429, "overloaded")
            await check_nothing_is_left(api, place)
            assert (await api.publish("acme", "sql", form(place.peft))).status == 200

    in_admin(test)


def test_what_a_killed_process_left_goes_and_what_is_in_use_stays(tmp_path: Path) -> None:
    folders = UploadFolders(tmp_path)
    with folders.open() as used:
        used.write([("a", b"1")])
        left = tmp_path / "upload-of-a-dead-process"
        left.mkdir()
        (left / "a").write_bytes(b"1")
        (tmp_path / "upload-of-a-dead-process.lock").write_bytes(b"")
        UploadFolders(tmp_path)
        assert used.path.is_dir() and not left.exists()
        assert len(list(tmp_path.iterdir())) == 2
    assert list(tmp_path.iterdir()) == []
    used.write([("b", b"1")])  # by a thread that was late
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_answer_of_its_own(tmp_path: Path) -> None:
    folder = UploadFolders(tmp_path).open()
    folder._files["a"] = Path("/dev/full").open("wb", buffering=0)  # noqa: SIM115
    with pytest.raises(ApiError, match="no room") as raised:
        folder.write([("a", b"1")])
    assert raised.value.status == 507
    folder.close()
    assert list(tmp_path.iterdir()) == []


# ---- under load ----------------------------------------------------------------------------


def test_a_name_that_is_republished_under_load_never_mixes_versions(place: Place) -> None:
    """Each answer is of one version: of one that was the latest while its request ran."""

    async def test() -> None:
        async with administered(place) as api:
            prints = [await version(api, place, n, f"copy{n}") for n in range(10)]
            assert len({each[:3] for each in prints}) == len(prints)
            digests = [await version(api, place, 0)]
            upcoming: list[str] = []
            is_over = False

            async def ask() -> int:
                num_asked = 0
                while not is_over:
                    first = len(digests) - 1
                    said = await api.said("sql")
                    possible = [*digests[first:], *upcoming]
                    assert said in {f"{digest[:3]}:X" for digest in possible}
                    num_asked += 1
                return num_asked

            clients = [asyncio.create_task(ask()) for _ in range(4)]
            for number in range(1, 10):
                upcoming.append(prints[number])
                digests.append(await version(api, place, number))
                upcoming.clear()
            is_over = True
            assert sum(await asyncio.gather(*clients)) > 20
            assert digests == prints and place.open().resolve("acme", "sql").version == 10

    in_admin(test)


async def version(api: Api, place: Place, number: int, name: str = "sql") -> str:
    """Publish content of this number."""
    files = form(place.peft)
    config = json.loads(files[CONFIG_NAME]) | {"lora_alpha": number + 1}
    files[CONFIG_NAME] = json.dumps(config).encode()
    digest: str = (await api.publish("acme", name, files)).json["digest"]
    return digest
