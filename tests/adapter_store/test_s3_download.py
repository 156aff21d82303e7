"""Downloads from a real S3 server behind one that breaks them: cut anywhere, stopped, changed."""

import os
import random
import resource
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from adapter_store import s3_client, s3_download
from adapter_store.errors import DownloadStopped, ObjectChanged, SourceUnavailable, StoreCorrupt
from adapter_store.object_store import Reading
from adapter_store.open_store import open_store
from adapter_store.s3_store import S3Store
from adapter_store.store import AdapterStore
from tests.adapter_store.forwarder import Forward, Forwarder, Reply, Request
from tests.adapter_store.roots import Root
from tests.swift.process import Swift

PART, PIECE, NBYTES = 1000, 100, 2500
DATA = random.Random(3).randbytes(NBYTES)


@pytest.fixture
def root(s3_root: Root) -> Root:
    return s3_root


@pytest.fixture
def forwarder(
    root: Root, swift: Swift, monkeypatch: pytest.MonkeyPatch
) -> Generator[Forwarder, None, None]:
    """An object in three parts behind a server that breaks as tests say."""
    monkeypatch.setattr(s3_download, "PART_BYTES", PART)
    monkeypatch.setattr(s3_download, "PIECE_BYTES", PIECE)
    monkeypatch.setattr(s3_download, "MUCH_BYTES", 500)
    monkeypatch.setattr(s3_download, "PAUSE_S", 0.001)
    root.open().put("k", DATA)
    with Forwarder(swift.endpoint_url) as forwarder:
        yield forwarder


@pytest.fixture
def tested(root: Root, forwarder: Forwarder) -> S3Store:
    opened = open_store(root.url, forwarder.endpoint_url, read_only=True)
    assert isinstance(opened, S3Store)
    return opened


def range_of(request: Request) -> tuple[int, int]:
    start, _, last = request.headers["Range"].removeprefix("bytes=").partition("-")
    return int(start), int(last)


def cut(reply: Reply, num_sent: int) -> Reply:
    return Reply(reply.status, reply.headers, reply.body, num_sent)


@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("num_sent", [None, 0, 1, PIECE - 1, PIECE, PIECE + 1, 499])
def test_a_part_that_is_cut_anywhere_goes_on_where_it_was_cut(
    num_sent: int | None, part: int, tested: S3Store, forwarder: Forwarder, tmp_path: Path
) -> None:
    cuts = threading.Semaphore(1)

    def break_off(request: Request, forward: Forward) -> Reply | None:
        start, _ = range_of(request)
        if start != part * PART or not cuts.acquire(blocking=False):
            return forward()
        return None if num_sent is None else cut(forward(), num_sent)

    forwarder.fault = break_off
    tested.get_file("k", tmp_path / "k")
    assert (tmp_path / "k").read_bytes() == DATA
    asked = sorted(range_of(request) for request in forwarder.requests)
    end = min(NBYTES, part * PART + PART) - 1
    come = num_sent or 0  # of a piece that is cut nothing may be kept
    first = [start - part * PART for start, last in asked if last == end]
    assert len(asked) == 4 and come // PIECE * PIECE <= first[1] <= come, asked
    tags = [request.headers.get("If-Match") for request in forwarder.requests]
    assert tags.count(None) <= 2 and len(set(tags) - {None}) == 1  # at first it is not known


def test_a_server_that_cuts_every_answer_is_borne_while_enough_comes(
    tested: S3Store, forwarder: Forwarder, tmp_path: Path
) -> None:
    seen: list[int] = []
    forwarder.fault = lambda _, forward: cut(forward(), 600)
    tested.get_file("k", tmp_path / "k", Reading(seen.append))
    assert (tmp_path / "k").read_bytes() == DATA and sum(seen) == NBYTES
    forwarder.requests.clear()
    forwarder.fault = lambda _, forward: cut(forward(), 1)
    with pytest.raises(SourceUnavailable, match="cannot read k in bucket"):
        tested.get_file("k", tmp_path / "k")
    assert len(forwarder.requests) <= 3 * s3_client.MAX_ATTEMPTS
    assert os.listdir(tmp_path) == []


def test_one_state_alone_is_read_also_of_a_server_without_if_match(
    root: Root, tested: S3Store, forwarder: Forwarder, tmp_path: Path
) -> None:
    def ignore_conditions(request: Request, forward: Forward) -> Reply:
        start, last = range_of(request)
        if start == PART:
            root.open().put("k", bytes(NBYTES))
        reply = forward()
        if reply.status != 412:
            return reply
        body = bytes(last - start + 1)
        headers = {"content-range": f"bytes {start}-{last}/{NBYTES}", "etag": '"another"'}
        return Reply(206, headers | {"content-length": str(len(body))}, body)

    forwarder.fault = ignore_conditions
    with pytest.raises(ObjectChanged, match="k changed while it was downloaded"):
        tested.get_file("k", tmp_path / "k")
    assert os.listdir(tmp_path) == []


def test_only_the_state_that_was_asked_for_is_read(
    root: Root, tested: S3Store, tmp_path: Path
) -> None:
    (listed,) = tested.describe("k")
    tested.get_file("k", tmp_path / "k", Reading(etag=listed.etag))
    assert (tmp_path / "k").read_bytes() == DATA
    root.open().put("k", DATA[::-1])
    with pytest.raises(ObjectChanged):
        tested.get_file("k", tmp_path / "k", Reading(etag=listed.etag))


def test_a_download_that_nobody_wants_any_more_asks_for_nothing_more(
    tested: S3Store, forwarder: Forwarder, tmp_path: Path
) -> None:
    came: list[int] = []
    how = Reading(came.append, is_wanted=lambda: sum(came) < 300)
    with pytest.raises(DownloadStopped):
        tested.get_file("k", tmp_path / "k", how)
    assert os.listdir(tmp_path) == [] and 300 <= sum(came) < NBYTES
    forwarder.requests.clear()
    with pytest.raises(DownloadStopped):
        tested.get_file("k", tmp_path / "k", how)
    assert forwarder.requests == []


@contextmanager
def no_file_above(num_bytes: int) -> Generator[None, None, None]:
    """Let the kernel refuse to write what lies behind so many bytes of a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_without_room_and_wrong_bytes_leave_nothing_and_may_be_tried_again(
    root: Root,
    forwarder: Forwarder,
    base_folder: Path,
    peft_folder: Path,
    tmp_path: Path,
) -> None:
    writer = AdapterStore(root.url, tmp_path / "writer", 2**30)
    writer.register_base(base_folder)
    ref = writer.publish(peft_folder, "public", "sql")
    url, disk = forwarder.endpoint_url, tmp_path / "reader"
    reader = AdapterStore(root.url, disk, 2**30, endpoint_url=url)
    with no_file_above(2000), pytest.raises(SourceUnavailable, match=r"cannot write .*too large"):
        reader.ensure_local(ref)

    def other_bytes(request: Request, forward: Forward) -> Reply:
        reply = forward()
        if "adapter_model" in request.path and range_of(request)[0] == PART:
            return Reply(reply.status, reply.headers, bytes(len(reply.body)))
        return reply

    forwarder.fault = other_bytes
    with pytest.raises(StoreCorrupt, match=r"the download of .* is damaged"):
        reader.ensure_local(ref)
    assert not reader.is_local(ref) and os.listdir(disk / ".partial") == []
    forwarder.fault = lambda _, forward: forward()
    assert reader.ensure_local(ref).is_dir()
