"""Faults that only S3 can have: credentials, latency, a server that fails or misbehaves."""

import hashlib
import logging
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import wait
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from email.utils import format_datetime, parsedate_to_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from adapter_store import s3_client as s3_client_module
from adapter_store import s3_download, s3_probe, s3_store
from adapter_store import store as store_module
from adapter_store.errors import (
    AccessDenied,
    AdapterNotFound,
    SourceUnavailable,
    StoreCorrupt,
)
from adapter_store.open_store import endpoint_from, open_store
from adapter_store.registry import Registry
from adapter_store.s3_store import OVERLAP_KEY, PROBE_KEY, S3Store
from adapter_store.s3_transfers import NUM_CONNECTIONS, PART_BYTES
from adapter_store.store import AdapterStore
from reef.__main__ import main
from tests.adapter_store.adapters import changed, write_base
from tests.adapter_store.forwarder import Forward, Forwarder, Reply, Request
from tests.adapter_store.publisher import Publisher
from tests.adapter_store.roots import BUCKET, Root, s3_client
from tests.adapter_store.synthetic import synthetic
from tests.swift.process import Swift

LARGE = random.Random(0).randbytes(20 * 2**20 + 12345)


@pytest.fixture
def root(s3_root: Root) -> Root:
    return s3_root


@pytest.fixture
def direct(root: Root) -> S3Store:
    opened = root.open()
    assert isinstance(opened, S3Store)
    return opened


def through(forwarder: Forwarder, root: Root) -> S3Store:
    opened = open_store(root.url, forwarder.endpoint_url)
    assert isinstance(opened, S3Store)
    return opened


def once(fault: Callable[[Request, Forward], Reply | None], wanted: str) -> Callable[..., object]:
    """Apply the fault to the first request whose method and path hold `wanted`, and to no other."""
    seen = threading.Semaphore(1)

    def first_only(request: Request, forward: Forward) -> Reply | None:
        if wanted in f"{request.method} {request.path}" and seen.acquire(blocking=False):
            return fault(request, forward)
        return forward()

    return first_only


def range_start(request: Request) -> int | None:
    value = request.headers.get("Range")
    return None if value is None else int(value.removeprefix("bytes=").split("-")[0])


# ---- a start that fails ------------------------------------------------------------------------


def test_a_wrong_secret_is_refused_and_never_shown(
    root: Root, swift: Swift, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush")
    with pytest.raises(SourceUnavailable) as error:
        root.open()
    sentence = str(error.value)
    assert f"to bucket {BUCKET} at {swift.endpoint_url}: SignatureDoesNotMatch: " in sentence
    assert "\n" not in sentence
    assert "hush-hush" not in sentence + caplog.text


def test_an_unknown_access_key_is_refused(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test:unknown")
    with pytest.raises(SourceUnavailable, match=f"to bucket {BUCKET} at .*: "):
        root.open()


def test_no_credentials_at_all_are_named_as_the_reason(
    root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(SourceUnavailable, match="no credentials, set AWS_ACCESS_KEY_ID"):
        root.open()


def test_a_missing_bucket_is_named(swift: Swift) -> None:
    with pytest.raises(SourceUnavailable, match=r"bucket absent at http://127\S*: NoSuchBucket"):
        open_store("s3://absent/prefix", swift.endpoint_url)


def test_an_unreachable_endpoint_is_named() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(SourceUnavailable, match=f"bucket bucket at {url}: Could not connect"):
            open_store("s3://bucket", url)


def test_a_server_that_is_not_s3_is_refused_in_one_sentence(swift: Swift, root: Root) -> None:
    page = Reply(200, {"content-length": "15", "content-type": "text/html"}, b"<html>Hi</html>")
    with Forwarder(swift.endpoint_url, lambda request, forward: page) as forwarder:
        with pytest.raises(SourceUnavailable, match="cannot be used: it ignores If-None-Match"):
            through(forwarder, root)
        forwarder.fault = lambda request, forward: Reply(501, {"content-length": "0"})
        with pytest.raises(SourceUnavailable, match="501") as error:
            through(forwarder, root)
    assert "\n" not in str(error.value)


def test_the_command_line_reports_a_missing_bucket_in_one_sentence(
    root: Root, swift: Swift, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["list", "--root", "s3://absent", "--endpoint-url", swift.endpoint_url]
    assert main([*command, "--cache", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("reef: cannot list snapshots/ in bucket absent at")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "url", ["s3://", "s3:bucket", "s3://b", "s3://bucket/a b", "s3://bucket/a//b", "s3://b?x=y/z"]
)
def test_a_root_that_is_no_bucket_and_prefix_is_refused(url: str) -> None:
    with pytest.raises(SourceUnavailable, match="must be s3://bucket or s3://bucket/prefix"):
        open_store(url, "http://127.0.0.1:1")


def test_secrets_in_a_url_are_refused_and_not_repeated() -> None:
    for root, endpoint_url in [
        ("s3://key:hush@bucket", "http://127.0.0.1:1"),
        ("s3://bucket", "http://key:hush@127.0.0.1:1"),
    ]:
        with pytest.raises(SourceUnavailable, match="must not hold") as error:
            open_store(root, endpoint_url)
        assert "hush" not in str(error.value)


def test_secrets_in_an_endpoint_of_the_environment_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://key:hush@127.0.0.1:1")
    with pytest.raises(SourceUnavailable, match="must not hold") as error:
        open_store("s3://bucket")
    assert "hush" not in str(error.value)


@pytest.mark.parametrize("url", ["127.0.0.1:9000", "ftp://host", "http://", "http://h?x", "hush"])
def test_an_endpoint_that_is_no_web_address_is_refused(url: str) -> None:
    with pytest.raises(SourceUnavailable, match="must be http://host:port"):
        open_store("s3://bucket", url)


def test_the_argument_wins_over_the_environment(
    root: Root, swift: Swift, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = "http://127.0.0.1:1"
    monkeypatch.setenv("S3_ENDPOINT_URL", nowhere)
    monkeypatch.setenv("AWS_ENDPOINT_URL", nowhere)
    open_store(root.url, swift.endpoint_url).put("k", b"argument")
    monkeypatch.setenv("S3_ENDPOINT_URL", swift.endpoint_url)
    assert open_store(root.url, endpoint_from(os.environ, root.url)).get("k") == b"argument"
    monkeypatch.setenv("S3_ENDPOINT_URL", "")
    monkeypatch.setenv("AWS_ENDPOINT_URL", swift.endpoint_url)
    assert open_store(root.url, endpoint_from(os.environ, root.url)).get("k") == b"argument"
    monkeypatch.setenv("AWS_ENDPOINT_URL", nowhere)
    with pytest.raises(SourceUnavailable, match=nowhere):
        open_store(root.url, endpoint_from(os.environ, root.url))


def test_the_store_itself_does_not_read_s3_endpoint_url(
    root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:1")
    open_store(root.url).put("k", b"v")
    assert open_store(root.url).get("k") == b"v"


def test_two_prefixes_of_one_bucket_share_nothing(root: Root, swift: Swift) -> None:
    one, other = open_store(f"{root.url}/one"), open_store(f"{root.url}/one-more")
    one.put("k", b"1")
    assert other.size("k") is None
    assert other.put_if_absent("k", b"2")
    assert (one.get("k"), other.get("k")) == (b"1", b"2")
    assert list(one.list("k")) == ["k"]


def test_a_file_root_needs_no_boto3(tmp_path: Path) -> None:
    script = (
        "import sys; from adapter_store.open_store import open_store; "
        f"open_store('file://{tmp_path}/root'); print('boto3' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"


# ---- put-if-absent -----------------------------------------------------------------------------


def test_a_store_that_ignores_if_none_match_is_refused(
    root: Root, swift: Swift, tmp_path: Path
) -> None:
    def obliging(request: Request, forward: Forward) -> Reply:
        reply = forward()
        return Reply(200, {"content-length": "0"}) if reply.status == 412 else reply

    with (
        Forwarder(swift.endpoint_url, obliging) as forwarder,
        pytest.raises(SourceUnavailable, match="ignores If-None-Match") as error,
    ):
        AdapterStore(root.url, tmp_path, 2**20, endpoint_url=forwarder.endpoint_url)
    assert f"bucket {BUCKET} at {forwarder.endpoint_url} cannot be used" in str(error.value)
    assert root.objects() == []


def test_a_single_writer_may_use_a_server_that_ignores_if_none_match(
    root: Root, swift: Swift, tmp_path: Path, peft_folder: Path, base_folder: Path
) -> None:
    def obliging(request: Request, forward: Forward) -> Reply:
        reply = forward()
        return Reply(200, {"content-length": "0"}) if reply.status == 412 else reply

    second = changed(peft_folder, tmp_path / "second", {"lora_alpha": 3})
    with Forwarder(swift.endpoint_url, obliging) as forwarder:

        def opened(**how: bool) -> AdapterStore:
            url = forwarder.endpoint_url
            return AdapterStore(root.url, tmp_path / "disk", 2**20, endpoint_url=url, **how)

        with pytest.raises(SourceUnavailable, match=r"adapters\.single_writer: true"):
            opened()
        store, base = opened(single_writer=True), opened(single_writer=True)
        fingerprint = base.register_base(base_folder)
        for number, folder in enumerate((peft_folder, second), start=1):
            assert store.publish(folder, "t", "sql", fingerprint).version == number
        reader = opened(may_write=False)
        assert [record.version for record in reader.list()] == [1, 2]
        for write in (
            lambda: reader.retire("t", "sql"),
            lambda: reader.publish(peft_folder, "t", "x", fingerprint),
            lambda: reader.register_base(base_folder),
        ):
            with pytest.raises(AccessDenied, match="this process writes nothing"):
                write()
        assert reader.register_base(base_folder, required=False) == fingerprint


def test_the_probe_is_one_request_from_the_second_start_on(root: Root, swift: Swift) -> None:
    with Forwarder(swift.endpoint_url) as forwarder:
        for num_requests in (2, 1, 1):
            forwarder.requests.clear()
            through(forwarder, root)
            sent = [each for each in forwarder.requests if OVERLAP_KEY not in each.path]
            assert len(sent) == num_requests
            assert all(request.path.endswith(PROBE_KEY) for request in sent)
            methods = [each.method for each in forwarder.requests if OVERLAP_KEY in each.path]
            assert methods == ([] if num_requests == 1 else ["PUT", "PUT", "DELETE"])


class CheckingServer:
    """As much of S3 as the probe needs; it checks before a body is read, or just before it writes.

    One PUT after another is right either way.
    """

    def __init__(self, is_atomic: bool) -> None:
        self.written: dict[str, bytes] = {}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_PUT(self) -> None:
                key = urlsplit(self.path).path
                exists = key in outer.written
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if exists or (is_atomic and key in outer.written):
                    return self.answer(412)
                outer.written[key] = body
                return self.answer(200)

            def do_DELETE(self) -> None:
                outer.written.pop(urlsplit(self.path).path, None)
                self.answer(204)

            def answer(self, status: int) -> None:
                self.send_response_only(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *arguments: object) -> None:
                """Log nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def test_a_server_that_checks_before_it_writes_is_refused_at_every_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(s3_probe, "HEAD_START_S", 0.2)
    monkeypatch.setattr(s3_probe, "OVERLAP_S", 10)
    server = CheckingServer(is_atomic=False)
    with closing(server):
        for _ in range(2):
            with pytest.raises(
                SourceUnavailable, match="two writes with If-None-Match that overlap"
            ):
                open_store("s3://bucket/prefix", server.url)
            assert server.written == {}


def test_a_server_that_keeps_one_of_two_overlapping_writes_is_used() -> None:
    server = CheckingServer(is_atomic=True)
    with closing(server):
        open_store("s3://bucket/prefix", server.url)
        assert list(server.written) == [f"/bucket/prefix/{PROBE_KEY}"]


def test_a_probe_that_cannot_be_made_stops_no_start(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unreachable(url: str) -> None:
        raise ConnectionRefusedError("a proxy is needed")

    monkeypatch.setattr(s3_probe, "_connect", unreachable)
    server = CheckingServer(is_atomic=True)
    with closing(server):
        open_store("s3://bucket/prefix", server.url)
    assert "could not be tested" in caplog.text


DENIED = b"<Error><Code>AccessDenied</Code><Message>no</Message></Error>"


def test_a_key_that_may_only_read_is_enough_to_serve(
    root: Root,
    swift: Swift,
    base_folder: Path,
    peft_folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def read_only(request: Request, forward: Forward) -> Reply:
        if request.method in ("GET", "HEAD"):
            return forward()
        return Reply(403, {"content-length": str(len(DENIED))}, DENIED)

    writer = AdapterStore(root.url, tmp_path / "w", 2**30)
    fingerprint = writer.register_base(base_folder)
    ref = writer.publish(peft_folder, "public", "sql")
    with Forwarder(swift.endpoint_url, read_only) as forwarder:
        reader = AdapterStore(root.url, tmp_path / "r", 2**30, endpoint_url=forwarder.endpoint_url)
        assert "can only be read with these credentials" in caplog.text
        assert reader.register_base(base_folder, required=False) == fingerprint
        assert reader.resolve("public", "sql") == ref and reader.ensure_local(ref).is_dir()
        other = write_base(tmp_path / "other", seed=9)
        assert len(reader.register_base(other, required=False)) == 64
        assert "is not registered" in caplog.text
        with pytest.raises(AccessDenied):
            reader.register_base(other)
        with pytest.raises(SourceUnavailable, match="AccessDenied"):
            reader.retire("public", "sql")


def used_by_nobody(root: Root, folder: Path) -> None:
    one = Publisher(root.open(), folder)
    one.publish("a", 0)
    one.registry.retire("t", "a")


@pytest.mark.parametrize("refused", [("PUT", "DELETE"), ("DELETE",)])
def test_collecting_garbage_with_too_few_rights_is_refused_as_that(
    refused: tuple[str, ...],
    root: Root,
    swift: Swift,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def deny(request: Request, forward: Forward) -> Reply:
        if request.method not in refused:
            return forward()
        return Reply(403, {"content-length": str(len(DENIED))}, DENIED)

    used_by_nobody(root, tmp_path)
    before = root.objects()
    with Forwarder(swift.endpoint_url, deny) as forwarder:
        where = ["--root", root.url, "--endpoint-url", forwarder.endpoint_url]
        command = ["gc", *where, "--cache", str(tmp_path / "cache"), "--grace", "0s"]
        assert main([*command, "--dry-run"]) == 0
        assert "would remove 3 objects" in capsys.readouterr().out
        assert {request.method for request in forwarder.requests} == {"GET"}
        assert main(command) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("reef: to remove garbage takes the rights to write and to remove: ")
    assert "AccessDenied: no" in error
    assert set(before) <= set(root.objects())


def test_ages_go_by_the_servers_clock(root: Root, swift: Swift, tmp_path: Path) -> None:
    def next_day(request: Request, forward: Forward) -> Reply:
        reply = forward()
        date = parsedate_to_datetime(reply.headers["date"]) + timedelta(days=1)
        return replace(reply, headers=reply.headers | {"date": format_datetime(date, usegmt=True)})

    def no_date(request: Request, forward: Forward) -> Reply:
        reply = forward()
        return replace(reply, headers={k: v for k, v in reply.headers.items() if k != "date"})

    used_by_nobody(root, tmp_path)
    assert Publisher(root.open(), tmp_path).collect(60).objects == []
    with Forwarder(swift.endpoint_url, no_date) as forwarder:
        with pytest.raises(SourceUnavailable, match="does not say what time it is"):
            Publisher(through(forwarder, root), tmp_path).collect(60)
        forwarder.fault = next_day
        assert len(Publisher(through(forwarder, root), tmp_path).collect(60).objects) == 3


def test_a_write_whose_answer_was_lost_counts_as_written(
    root: Root, direct: S3Store, swift: Swift
) -> None:
    def lose_answer(request: Request, forward: Forward) -> None:
        forward()

    with Forwarder(swift.endpoint_url, once(lose_answer, "/k")) as forwarder:
        assert through(forwarder, root).put_if_absent("k", b"ours")
    assert direct.get("k") == b"ours"
    assert not direct.put_if_absent("k", b"ours")


def test_a_lost_write_does_not_claim_another_writers_object(
    root: Root, direct: S3Store, swift: Swift
) -> None:
    def be_slower(request: Request, forward: Forward) -> None:
        assert direct.put_if_absent("k", b"same")

    with Forwarder(swift.endpoint_url, once(be_slower, "/k")) as forwarder:
        assert not through(forwarder, root).put_if_absent("k", b"same")


def test_a_conflict_with_another_writer_is_tried_again(
    root: Root, direct: S3Store, swift: Swift, monkeypatch: pytest.MonkeyPatch
) -> None:
    def conflict(request: Request, forward: Forward) -> Reply:
        return Reply(409, {"content-length": "0"})

    monkeypatch.setattr(s3_store, "CONFLICT_PAUSE_S", 0.0)
    with Forwarder(swift.endpoint_url, once(conflict, "/k")) as forwarder:
        tested = through(forwarder, root)
        assert tested.put_if_absent("k", b"v")
        assert direct.get("k") == b"v"
        forwarder.fault = conflict
        with pytest.raises(SourceUnavailable, match="20 attempts each met another writer"):
            tested.put_if_absent("other", b"v")


# ---- large objects -----------------------------------------------------------------------------


def upload(tested: S3Store, path: Path, data: bytes, key: str = "large") -> int:
    """Put the data; return how many bytes were reported."""
    path.write_bytes(data)
    seen: list[int] = []
    tested.put_file(key, path, hashlib.sha256(data).hexdigest(), seen.append)
    return sum(seen)


def test_a_large_object_is_written_and_read_in_concurrent_parts(
    root: Root, swift: Swift, tmp_path: Path
) -> None:
    together = threading.Barrier(2, timeout=60)  # broken unless two requests overlap

    def wait_for_the_other(request: Request, forward: Forward) -> Reply:
        if (range_start(request) or 0) > 0 or "partNumber=1&" in f"{request.path}&":
            together.wait()
        if "partNumber=2&" in f"{request.path}&":
            together.wait()
        return forward()

    with Forwarder(swift.endpoint_url, wait_for_the_other) as forwarder:
        tested = through(forwarder, root)
        assert upload(tested, tmp_path / "up", LARGE) == len(LARGE)
        forwarder.requests.clear()
        tested.get_file("large", tmp_path / "down")
    assert (tmp_path / "down").read_bytes() == LARGE
    starts = [range_start(request) for request in forwarder.requests]
    assert sorted(start for start in starts if start is not None) == [
        0,
        PART_BYTES,
        2 * PART_BYTES,
    ]
    etags = {request.headers.get("If-Match") for request in forwarder.requests}
    assert len(etags) == 2 and None in etags  # the first range has none yet


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_an_object_about_as_large_as_a_part_arrives_whole(
    extra: int, direct: S3Store, tmp_path: Path
) -> None:
    data = LARGE[: PART_BYTES + extra]
    assert upload(direct, tmp_path / "up", data) == len(data)
    direct.get_file("large", tmp_path / "down")
    assert (tmp_path / "down").read_bytes() == data


def test_any_number_of_ranges_makes_the_same_file(
    direct: S3Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_download, "PART_BYTES", 100)
    for nbytes in (0, 1, 99, 100, 101, 200, 2345):
        direct.put("k", LARGE[:nbytes])
        direct.get_file("k", tmp_path / "down")
        assert (tmp_path / "down").read_bytes() == LARGE[:nbytes]


def test_an_object_that_changes_while_it_is_downloaded_is_noticed(
    root: Root,
    direct: S3Store,
    swift: Swift,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(s3_download, "PART_BYTES", 1000)

    def replace_first(request: Request, forward: Forward) -> Reply:
        direct.put("k", b"y" * 5000)
        return forward()

    with Forwarder(swift.endpoint_url) as forwarder:
        tested = through(forwarder, root)
        direct.put("k", b"x" * 5000)
        forwarder.fault = lambda request, forward: (
            replace_first(request, forward) if range_start(request) == 3000 else forward()
        )
        with pytest.raises(StoreCorrupt, match="k changed while it was downloaded"):
            tested.get_file("k", tmp_path / "down")


def pending_uploads(root: Root, swift: Swift) -> list[str]:
    """List the keys of uploads that were begun and neither completed nor aborted."""
    prefix = root.url.removeprefix(f"s3://{BUCKET}/")
    uploads = s3_client(swift.endpoint_url).list_multipart_uploads(Bucket=BUCKET, Prefix=prefix)
    return [upload["Key"] for upload in uploads.get("Uploads", [])]


@pytest.mark.parametrize("nbytes", [1000, 2 * PART_BYTES, len(LARGE)])
def test_a_file_that_changes_while_it_is_uploaded_leaves_nothing(
    nbytes: int, direct: S3Store, root: Root, swift: Swift, tmp_path: Path
) -> None:
    path = tmp_path / "up"
    path.write_bytes(LARGE[:nbytes])
    with pytest.raises(StoreCorrupt, match="changed while it was uploaded"):
        direct.put_file("large", path, hashlib.sha256(b"other").hexdigest(), lambda _: None)
    assert direct.size("large") is None
    assert pending_uploads(root, swift) == []


def test_an_upload_that_fails_midway_leaves_nothing(
    direct: S3Store, root: Root, swift: Swift, tmp_path: Path
) -> None:
    others = threading.Semaphore(0)  # parts that have arrived; Swift makes an abort wait for them

    def refuse_the_second_part(request: Request, forward: Forward) -> Reply:
        if "partNumber=2&" in f"{request.path}&":
            for _ in range(len(LARGE) // PART_BYTES):
                others.acquire()
            return Reply(403, {"content-length": "0"})
        reply = forward()
        if "partNumber=" in request.path:
            others.release()
        return reply

    with (
        Forwarder(swift.endpoint_url, refuse_the_second_part) as forwarder,
        pytest.raises(SourceUnavailable, match=f"cannot write large to bucket {BUCKET} at .*403"),
    ):
        upload(through(forwarder, root), tmp_path / "up", LARGE)
    assert direct.size("large") is None
    assert pending_uploads(root, swift) == []


def test_a_file_that_is_gone_is_named(direct: S3Store, tmp_path: Path) -> None:
    with pytest.raises(SourceUnavailable, match=r"cannot read .*absent"):
        direct.put_file("k", tmp_path / "absent", "", lambda _: None)


def test_a_body_that_is_cut_short_is_requested_again(
    root: Root, direct: S3Store, swift: Swift, tmp_path: Path
) -> None:
    def break_off(request: Request, forward: Forward) -> Reply:
        reply = forward()
        return Reply(reply.status, reply.headers, reply.body, num_sent=len(reply.body) // 2)

    direct.put("k", LARGE[:100_000])
    with Forwarder(swift.endpoint_url, once(break_off, "GET")) as forwarder:
        tested = through(forwarder, root)
        assert tested.get("k") == LARGE[:100_000]
        forwarder.fault = once(break_off, "GET")  # type: ignore[assignment]
        tested.get_file("k", tmp_path / "down")
        assert (tmp_path / "down").read_bytes() == LARGE[:100_000]
        forwarder.fault = break_off
        with pytest.raises(SourceUnavailable, match=f"cannot read k in bucket {BUCKET} at"):
            tested.get("k")


def test_a_server_that_ignores_ranges_is_refused(
    root: Root, direct: S3Store, swift: Swift, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_download, "PART_BYTES", 1000)

    def whole(request: Request, forward: Forward) -> Reply:
        if request.method != "GET":
            return forward()
        return Reply(200, {"content-length": "5000", "etag": '"e"'}, b"x" * 5000)

    direct.put("k", b"x" * 5000)
    with Forwarder(swift.endpoint_url, whole) as forwarder:
        tested = through(forwarder, root)
        with pytest.raises(SourceUnavailable, match="does not answer with the range asked"):
            tested.get_file("k", tmp_path / "down")


@pytest.mark.parametrize("answered", ["bytes 1-1000/5000", "bytes 0-1999/5000", "bytes 0-999/*"])
def test_an_answer_with_another_range_is_refused(
    answered: str,
    root: Root,
    direct: S3Store,
    swift: Swift,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(s3_download, "PART_BYTES", 1000)

    def other(request: Request, forward: Forward) -> Reply:
        reply = forward()
        if request.method != "GET":
            return reply
        return Reply(206, reply.headers | {"content-range": answered}, reply.body)

    direct.put("k", b"x" * 5000)
    with Forwarder(swift.endpoint_url, other) as forwarder:
        tested = through(forwarder, root)
        with pytest.raises(SourceUnavailable, match="does not answer with the range asked"):
            tested.get_file("k", tmp_path / "down")


def test_a_download_that_fails_leaves_no_file(
    root: Root, direct: S3Store, swift: Swift, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_download, "PART_BYTES", 1000)
    folder = tmp_path / "down"
    folder.mkdir()

    def break_off_the_last(request: Request, forward: Forward) -> Reply:
        reply = forward()
        is_last = (range_start(request) or 0) >= 4000
        return Reply(reply.status, reply.headers, reply.body, num_sent=10 if is_last else None)

    direct.put("k", b"x" * 5000)
    with Forwarder(swift.endpoint_url, break_off_the_last) as forwarder:
        tested = through(forwarder, root)
        forwarder.requests.clear()
        with pytest.raises(SourceUnavailable, match=f"cannot read k in bucket {BUCKET} at"):
            tested.get_file("k", folder / "k")
    assert os.listdir(folder) == []
    starts = [range_start(request) for request in forwarder.requests]
    assert len([s for s in starts if s and s >= 4000]) == s3_client_module.MAX_ATTEMPTS


def test_a_download_asks_a_server_that_hangs_no_more_often_than_other_requests(
    root: Root, direct: S3Store, swift: Swift, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_client_module, "READ_TIMEOUT_S", 3.0)
    monkeypatch.setattr(s3_client_module, "MAX_ATTEMPTS", 1)
    is_over = threading.Event()

    def hang(request: Request, forward: Forward) -> Reply | None:
        if request.method != "GET":
            return forward()
        is_over.wait(60)
        return None

    direct.put("k", b"x" * 5000)
    with Forwarder(swift.endpoint_url, hang) as forwarder:
        # Without the probe, which would have to be quicker than the short timeout too.
        tested = open_store(root.url, forwarder.endpoint_url, read_only=True)
        with pytest.raises(SourceUnavailable, match="Read timeout"):
            tested.get_file("k", tmp_path / "down")
        is_over.set()
    assert len(forwarder.requests) == 1


# ---- listings and the log ----------------------------------------------------------------------


def test_a_listing_of_many_pages_is_complete_and_in_order(
    root: Root, direct: S3Store, swift: Swift
) -> None:
    keys = [f"log/{n:02}" for n in range(25)]  # ten to a page
    for key in keys:
        direct.put(key, b"")
    with Forwarder(swift.endpoint_url) as forwarder:
        tested = through(forwarder, root)
        forwarder.requests.clear()
        assert list(tested.list("log/")) == keys
        assert len(forwarder.requests) == 3
        assert list(tested.list("log/", start_after="log/07")) == keys[8:]
        forwarder.requests.clear()
        assert list(tested.list("log/", start_after="log/24")) == []
        assert len(forwarder.requests) == 1


def test_a_cold_start_reads_the_log_concurrently(root: Root, direct: S3Store, swift: Swift) -> None:
    written = Registry(direct, lambda: 0.0)
    for seed in range(2 * NUM_CONNECTIONS):
        written.publish("t", "sql", synthetic(seed)[0])
    together = threading.Barrier(NUM_CONNECTIONS, timeout=60)  # broken unless that many overlap

    def wait_for_the_others(request: Request, forward: Forward) -> Reply:
        if "/log/" in request.path:
            together.wait()
        return forward()

    with Forwarder(swift.endpoint_url, wait_for_the_others) as forwarder:
        reader = Registry(through(forwarder, root), lambda: 0.0)
    assert reader.list() == written.list()
    assert len(reader.list()) == 2 * NUM_CONNECTIONS


# ---- a store that becomes unavailable ----------------------------------------------------------


def adapters_known_and_cached(
    root: Root, base_folder: Path, peft_folder: Path, tmp_path: Path, endpoint_url: str
) -> AdapterStore:
    """Make a reader that knows two adapters and has the files of one."""
    writer = AdapterStore(root.url, tmp_path / "writer", 2**30)
    writer.register_base(base_folder)
    cached = writer.publish(peft_folder, "public", "cached")
    other = changed(peft_folder, tmp_path / "other", {"lora_alpha": 3})
    writer.publish(other, "public", "remote")
    reader = AdapterStore(root.url, tmp_path / "reader", 2**30, endpoint_url=endpoint_url)
    reader.ensure_local(cached)
    return reader


def check_that_cached_adapters_are_still_served(reader: AdapterStore, where: str) -> None:
    cached = reader.resolve("public", "cached")
    remote = reader.resolve("public", "remote")
    assert (reader.ensure_local(cached) / "adapter_config.json").is_file()
    assert [record.name for record in reader.list()] == ["cached", "remote"]
    with pytest.raises(SourceUnavailable, match=where):
        reader.ensure_local(remote)
    assert not reader.is_local(remote)
    for _ in range(3):
        with pytest.raises(SourceUnavailable):
            reader.resolve("public", "unheard-of")


def test_a_server_that_is_gone_stops_only_what_is_not_cached(
    root: Root, swift: Swift, base_folder: Path, peft_folder: Path, tmp_path: Path
) -> None:
    with Forwarder(swift.endpoint_url) as forwarder:
        url = forwarder.endpoint_url
        reader = adapters_known_and_cached(root, base_folder, peft_folder, tmp_path, url)
    check_that_cached_adapters_are_still_served(reader, f"bucket {BUCKET} at {url}")


def test_a_server_that_hangs_stops_only_what_is_not_cached(
    root: Root,
    swift: Swift,
    base_folder: Path,
    peft_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    url = swift.endpoint_url
    monkeypatch.setattr(s3_client_module, "READ_TIMEOUT_S", 3.0)
    monkeypatch.setattr(s3_client_module, "MAX_ATTEMPTS", 1)
    reader = adapters_known_and_cached(root, base_folder, peft_folder, tmp_path, url)
    with swift.paused(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_module, "PATIENCE_S", 0.05)
        reader._next_refresh_s = 0.0  # a refresh is due
        check_that_cached_adapters_are_still_served(
            reader, f"bucket {BUCKET} at {url}: Read timeout"
        )
    assert "answering from memory" in caplog.text
    assert "the store has not answered for 0.05 s" in caplog.text
    wait([reader._last_refresh], timeout=60)  # the refresh that hung
    assert reader.ensure_local(reader.resolve("public", "remote")).is_dir()
    reader._next_miss_s = 0.0
    with pytest.raises(AdapterNotFound):
        reader.resolve("public", "unheard-of")


def test_a_name_changes_soon_after_a_read_of_the_log_has_hung(
    root: Root,
    swift: Swift,
    base_folder: Path,
    peft_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A connection that hangs for good must not hold back what could be read after it."""
    is_hanging, is_over = threading.Event(), threading.Event()

    def hang(request: Request, forward: Forward) -> Reply | None:
        if not is_hanging.is_set():
            return forward()
        is_over.wait(60)
        return None

    writer = AdapterStore(root.url, tmp_path / "w", 2**30, endpoint_url=swift.endpoint_url)
    base = writer.register_base(base_folder)
    writer.publish(peft_folder, "public", "name", base)
    second = changed(peft_folder, tmp_path / "second", {"lora_alpha": 3})
    with Forwarder(swift.endpoint_url, hang) as forwarder:
        url = forwarder.endpoint_url
        reader = AdapterStore(root.url, tmp_path / "r", 2**30, endpoint_url=url, read_only=True)
        is_hanging.set()
        reader._next_refresh_s = 0.0
        with monkeypatch.context() as patch:
            patch.setattr(store_module, "PATIENCE_S", 0.5)
            assert reader.resolve("public", "name").version == 1, "what was known"
        is_hanging.clear()  # for new connections
        writer.publish(second, "public", "name", base)
        hung = reader._last_refresh
        start_s = time.monotonic()
        assert wait([hung], timeout=60).done
        assert time.monotonic() - start_s < s3_client_module.READ_TIMEOUT_S / 2
        reader._next_refresh_s = 0.0
        assert reader.resolve("public", "name").version == 2
        is_over.set()


def test_a_download_that_is_cut_leaves_nothing_and_may_be_tried_again(
    root: Root, swift: Swift, base_folder: Path, peft_folder: Path, tmp_path: Path
) -> None:
    def cut(request: Request, forward: Forward) -> Reply | None:
        return None if "adapter_model" in request.path else forward()

    with Forwarder(swift.endpoint_url, cut) as forwarder:
        url = forwarder.endpoint_url
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(s3_client_module, "MAX_ATTEMPTS", 1)
            writer = AdapterStore(root.url, tmp_path / "writer", 2**30)
            writer.register_base(base_folder)
            ref = writer.publish(peft_folder, "public", "sql")
            reader = AdapterStore(root.url, tmp_path / "reader", 2**30, endpoint_url=url)
        with pytest.raises(SourceUnavailable, match="cannot read blobs"):
            reader.ensure_local(ref)
        assert not reader.is_local(ref)
        assert os.listdir(tmp_path / "reader" / ".partial") == []
        forwarder.fault = lambda request, forward: forward()
        assert reader.ensure_local(ref).is_dir()
