"""Records through crashes: whatever is killed, and whatever is full or out of reach, each request
counts once, and what is lost is counted."""

import errno
import gzip
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapter_store.errors import SourceUnavailable
from adapter_store.file_store import FileStore
from deployments.usage.journal import HEADER_BYTES, SLOT_BYTES, Journal
from deployments.usage.meter import UsageMeter
from deployments.usage.reader import Found, NotUsage, Seen, read_records
from deployments.usage.record import UsageRecord, checked, unchecked
from deployments.usage.recovery import recover
from deployments.usage.spool import Segment

SLOTS = 8


def record(request_id: str = "r", **fields: object) -> UsageRecord:
    known = {"time_s": 1.0, "tenant": "acme", "route": "/v1/completions", "model": "base"}
    return UsageRecord(id="", request_id=request_id, **(known | fields))  # type: ignore[arg-type]


class Machine:
    """One machine's folder and the store. Its meters have no threads: the test turns them."""

    def __init__(self, folder: Path, max_bytes: int = 2**20) -> None:
        self.folder, self.max_bytes = folder / "spool", max_bytes
        self.store = FileStore(folder / "store")

    def meter(self) -> UsageMeter:
        return UsageMeter(self.folder, self.max_bytes, self.store, 1.0, 60.0, num_slots=SLOTS)

    def kill(self, meter: UsageMeter) -> None:
        """As SIGKILL: nothing is flushed, and the system frees the locks."""
        meter._journal.close()
        segment = meter.writer._spool._segment
        if segment is not None:
            segment._file.close()

    def read(self) -> tuple[list[UsageRecord], Found]:
        found = Found()
        return list(read_records(self.store, [self.folder], found)), found


def serve(meter: UsageMeter, request_id: str, output: int = 2, ends: bool = True) -> None:
    charge = meter.begin(record(request_id))
    charge.read(3, 1, 0, 0.25, 0.5)
    charge.sent(output, 0)
    if ends:
        charge.end(200, {"stop"})


def ids(records: list[UsageRecord]) -> list[str]:
    return sorted(each.request_id for each in records)


def test_a_record_comes_back_as_it_was_told(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    meter = machine.meter()
    charge = meter.begin(record("é" * 60, priority=-3, key_id="k"), held_s=10.0)
    charge.read(3, 1, 2**40, 0.25, 0.5)
    charge.sent(2, 1)
    charge.end(200, {"stop", "tool_calls"})
    meter.close()
    [found], _ = machine.read()
    assert found.request_id == "é" * 60 and found.priority == -3 and found.key_id == "k"
    assert (found.prompt_tokens, found.cached_tokens, found.load_bytes) == (3, 1, 2**40)
    assert (found.output_tokens, found.reasoning_tokens) == (2, 1)
    assert (found.queue_s, found.ttft_s, found.status) == (0.25, 0.5, 200)
    assert found.finish_reason == "stop,tool_calls" and found.e2e_s >= 10.0
    assert not list(machine.folder.glob("*.journal")) and not list(machine.folder.glob("*.log"))


def test_a_killed_process_leaves_all_that_it_had_told(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    meter = machine.meter()
    serve(meter, "flushed")
    meter.writer.flush()
    serve(meter, "ended")
    serve(meter, "running", output=5, ends=False)
    meter.begin(record("begun"))
    machine.kill(meter)
    machine.meter().writer.upload()
    records, found = machine.read()
    assert ids(records) == ["begun", "ended", "flushed", "running"] and not found.repeated
    by_id = {each.request_id: each for each in records}
    assert (by_id["running"].output_tokens, by_id["running"].finish_reason) == (5, "killed")
    assert by_id["running"].status == 500 and by_id["ended"].status == 200
    assert by_id["begun"].prompt_tokens == by_id["begun"].output_tokens == 0


def test_a_live_process_is_left_alone_by_the_others(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    meter, other = machine.meter(), machine.meter()
    serve(meter, "a")
    meter.writer.flush()
    serve(meter, "b", ends=False)
    other.writer.upload()
    assert ids(machine.read()[0]) == ["a"] and len(list(machine.folder.glob("*.journal"))) == 2
    meter.close()
    other.close()


WHERE = ["before it appends", "after it has appended", "after the journal is gone", "never"]


@pytest.mark.parametrize("where", WHERE)
def test_a_recovery_that_is_killed_is_finished_by_the_next(
    tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def kill(*arguments: object) -> None:
        raise Killed

    machine = Machine(tmp_path)
    meter = machine.meter()
    serve(meter, "flushed")
    meter.writer.flush()
    serve(meter, "ended")
    machine.kill(meter)
    with monkeypatch.context() as patch:
        if where == "before it appends":
            patch.setattr("deployments.usage.recovery._append_missing", kill)
        elif where == "after it has appended":
            patch.setattr("deployments.usage.journal.DeadJournal.remove", kill)
        elif where == "after the journal is gone":
            patch.setattr(Path, "rename", kill)
        try:
            recover(machine.folder)
        except Killed:
            # What the process had locked is free.
            for path in machine.folder.glob("*.journal"):
                _free(path)
    meter = machine.meter()
    meter.writer.upload()
    records, found = machine.read()
    assert ids(records) == ["ended", "flushed"] and not found.repeated
    assert not list(machine.folder.glob("*.open"))


def _free(path: Path) -> None:
    """Close this process's descriptors of a file, as its death would."""
    for entry in list(Path("/proc/self/fd").iterdir()):
        try:
            if Path(os.readlink(entry)) == path:
                os.close(int(entry.name))
        except OSError:
            continue


def test_a_torn_last_line_is_written_again_and_counts_once(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    meter = machine.meter()
    serve(meter, "a")
    meter.writer.flush()
    serve(meter, "b")
    machine.kill(meter)
    [path] = machine.folder.glob("*.open")
    with path.open("ab") as file:
        file.write(checked(b'{"kind":"request","id":"torn')[:20])
    machine.meter().writer.upload()
    assert ids(machine.read()[0]) == ["a", "b"]


@settings(max_examples=25)
@given(data=st.data())
def test_any_order_of_work_and_kills_gives_each_request_once(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    machine = Machine(tmp_path_factory.mktemp("machine"))
    meters = [machine.meter(), machine.meter()]
    wanted: dict[str, int] = {}
    actions = ["serve", "leave open", "flush", "rotate", "upload", "kill", "copy the store's"]
    for number in range(data.draw(st.integers(1, 25))):
        at = data.draw(st.integers(0, 1))
        meter, action = meters[at], data.draw(st.sampled_from(actions))
        if action in ("serve", "leave open"):
            if meter._journal.num_taken < SLOTS:
                wanted[str(number)] = number
                serve(meter, str(number), output=number, ends=action == "serve")
        elif action == "flush":
            meter.writer.flush()
        elif action == "rotate":
            meter.writer.flush()
            meter.writer._spool.rotate()
        elif action == "upload":
            meter.writer.upload()
        elif action == "kill":
            machine.kill(meter)
            meters[at] = machine.meter()
        else:
            for key in machine.store.list("usage/"):
                name = key.removeprefix("usage/")
                (machine.folder / name).write_bytes(machine.store.get(key))
    for meter in meters:
        machine.kill(meter)
    machine.meter().writer.upload()
    records, _ = machine.read()
    assert {each.request_id: each.output_tokens for each in records} == wanted
    assert len(records) == len(wanted)


# ---- what is full, or out of reach ---------------------------------------------------------


class Outage(FileStore):
    """A store that cannot be reached, or that takes an object and then breaks off."""

    fault: str | None = None

    def put_if_absent(self, key: str, data: bytes) -> bool:
        if self.fault == "down":
            raise SourceUnavailable("no route to it")
        done = super().put_if_absent(key, data)
        if self.fault == "breaks off":
            raise SourceUnavailable("the connection broke")
        return done


@pytest.mark.parametrize("fault", ["down", "breaks off"])
def test_an_outage_of_the_store_delays_records_and_repeats_none(
    tmp_path: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    machine = Machine(tmp_path)
    machine.store = store = Outage(tmp_path / "store")
    meter = machine.meter()
    store.fault = fault
    serve(meter, "a")
    meter.writer.flush()
    meter.writer._spool.rotate()
    meter.writer.upload()
    assert meter.read_counts().upload.failures == 1 and "cannot be uploaded" in caplog.text
    assert meter.read_counts().spool_bytes > 0
    assert ids(machine.read()[0]) == ["a"]
    store.fault = None
    meter.close()
    records, found = machine.read()
    assert ids(records) == ["a"] and found.repeated == 0 and not list(machine.folder.glob("*.log"))


def full_disk(file: object, data: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_loses_only_what_memory_does_not_hold_and_counts_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    machine = Machine(tmp_path)
    meter = machine.meter()
    with monkeypatch.context() as patch:
        patch.setattr("deployments.usage.spool._write_all", full_disk)
        for number in range(SLOTS + 3):
            serve(meter, str(number))
            meter.writer.flush()
        counts = meter.read_counts()
        assert (counts.lost, counts.waiting, counts.written) == (3, SLOTS, 0)
        assert counts.write_failures == SLOTS + 3
        assert caplog.text.count("cannot be written") == 1, "not with every flush"
    serve(meter, "later")  # its room comes with the flush
    meter.close()
    records, found = machine.read()
    assert ids(records) == sorted(str(n) for n in range(SLOTS))
    assert found.lost_requests == 4
    [lost] = found.lost.values()
    assert (lost.prompt_tokens, lost.output_tokens) == (12, 8)


def test_a_write_that_breaks_off_leaves_no_part(tmp_path: Path) -> None:
    segment = Segment(tmp_path / "a.open", 0.0)
    segment.append([b"{}"])

    class Half:
        def __init__(self, file: object) -> None:
            self.file = file

        def write(self, data: bytes) -> int:
            if len(data) < 10:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(data[:9])  # type: ignore[attr-defined]

        def __getattr__(self, name: str) -> object:
            return getattr(self.file, name)

    file, segment._file = segment._file, Half(segment._file)  # type: ignore[assignment]
    with pytest.raises(OSError, match="No space"):
        segment.append([b"{} "])
    segment._file = file
    segment.append([b"[]"])
    segment.close()
    assert (tmp_path / "a.log").read_bytes() == checked(b"{}") + checked(b"[]")


def test_a_folder_that_holds_as_much_as_it_may_takes_no_more(tmp_path: Path) -> None:
    machine = Machine(tmp_path, max_bytes=100)
    meter = machine.meter()
    for name in "abc":
        serve(meter, name)
        meter.writer.flush()
    counts = meter.read_counts()
    assert (counts.written, counts.waiting, counts.write_failures) == (1, 2, 2)
    meter.writer._spool.rotate()
    meter.writer.upload()
    meter.writer.flush()
    assert meter.read_counts().written == 3
    meter.close()
    assert ids(machine.read()[0]) == ["a", "b", "c"]


def test_a_folder_that_is_full_is_uploaded_as_any_other(tmp_path: Path) -> None:
    machine = Machine(tmp_path, max_bytes=100)
    meter = machine.meter()
    spool = meter.writer._spool
    serve(meter, "a")
    meter.writer.flush()
    clock = spool._clock
    spool._clock = lambda: clock() + 61.0
    serve(meter, "b")
    for _ in range(2):
        meter.writer.flush()
        meter.writer.upload()
    assert meter.read_counts().written == 2
    meter.close()


def test_without_room_for_the_journal_requests_are_recorded_from_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(os, "posix_fallocate", lambda *a: full_disk(*a[:2]))
    machine = Machine(tmp_path)
    meter = machine.meter()
    assert "a kill would lose records" in caplog.text
    serve(meter, "a")
    meter.writer.flush()
    machine.meter().writer.upload()
    assert ids(machine.read()[0]) == ["a"], "its segment is its own"
    meter.close()
    assert ids(machine.read()[0]) == ["a"]


def test_a_line_that_changed_on_disk_is_kept_and_counted(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    meter = machine.meter()
    for name in "ab":
        serve(meter, name)
        meter.writer.flush()
    meter.writer._spool.rotate()
    [path] = machine.folder.glob("*.log")
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b'"a"', b'"x"'))
    meter.writer.upload()
    assert meter.read_counts().upload.damaged_lines == 1
    records, found = machine.read()
    assert ids(records) == ["b"] and found.damaged_lines == 1


def test_the_threads_flush_and_upload_by_themselves(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    arrived = threading.Event()

    class Waiting(FileStore):
        def put_if_absent(self, key: str, data: bytes) -> bool:
            done = super().put_if_absent(key, data)
            arrived.set()
            return done

    machine.store = Waiting(tmp_path / "store")
    meter = UsageMeter(machine.folder, 2**20, machine.store, 0.01, 0.02, num_slots=SLOTS)
    meter.start()
    serve(meter, "a")
    assert arrived.wait(20)
    [key] = machine.store.list("usage/")
    assert gzip.decompress(machine.store.get(key)).count(b"\n") == 1
    meter.close()


# ---- a real kill ---------------------------------------------------------------------------

VICTIM = """
import sys
from pathlib import Path
from deployments.usage.meter import UsageMeter
from deployments.usage.record import UsageRecord
meter = UsageMeter(Path(sys.argv[1]), 2**30, None, 0.001, 0.01, num_slots=64)
meter.start()
number = 0
while True:
    record = UsageRecord(id="", request_id=str(number), time_s=1, tenant="t", route="r", model="m")
    charge = meter.begin(record)
    charge.sent(number % 7, 0)
    charge.end(200, set())
    print(number, flush=True)
    number += 1
    while meter._journal.num_taken > 60:
        pass
"""


def test_what_a_process_had_said_before_sigkill_is_there(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", VICTIM, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        said = [process.stdout.readline() for _ in range(200)]
        process.kill()
        said += process.stdout.read().splitlines()
        last = int(said[-1])
    finally:
        process.kill()
        process.communicate()
    recover(tmp_path)
    found = Found()
    outputs = {int(r.request_id): r.output_tokens for r in read_records(None, [tmp_path], found)}
    assert found.repeated == 0 and sorted(outputs)[: last + 1] == list(range(last + 1))
    assert len(outputs) <= last + 2, "at most the one that it had not said yet"
    assert all(output in (number % 7, 0) for number, output in outputs.items())


# ---- parts ---------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 30)), max_size=60))
def test_seen_knows_what_came(pairs: list[tuple[str, int]]) -> None:
    seen, known = Seen(), set[str]()
    for writer, number in pairs:
        name = f"{writer}-{number}"
        assert seen.add(name) == (name not in known)
        known.add(name)
    for ranges in seen._ranges.values():
        assert all(a[1] < b[0] for a, b in pairwise(ranges))


@given(st.binary(max_size=40).filter(lambda data: b"\n" not in data), st.data())
def test_a_changed_line_is_noticed(content: bytes, data: st.DataObject) -> None:
    line = checked(content)[:-1]
    assert unchecked(line) == content
    at = data.draw(st.integers(0, len(line) - 1))
    changed = bytearray(line)
    changed[at] ^= 1 << data.draw(st.integers(0, 7))
    assert unchecked(bytes(changed)) in (None, content)


def test_a_journal_takes_no_more_than_it_has_slots_for(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path / "a.journal", 2)
    assert (tmp_path / "a.journal").stat().st_size == HEADER_BYTES + 2 * SLOT_BYTES
    assert journal.begin(b"x" * SLOT_BYTES) is None
    assert [journal.begin(b"{}") is None for _ in range(3)] == [False, False, True]
    journal.close()


@pytest.mark.parametrize(
    "damage", [lambda p: p.write_bytes(b"junk"), lambda p: p.write_bytes(gzip.compress(b"[1]\n"))]
)
def test_what_holds_no_records_is_refused_by_name(
    tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    path = tmp_path / "a.jsonl.gz"
    damage(path)
    with pytest.raises(NotUsage, match=r"a\.jsonl\.gz"):
        list(read_records(None, [path], Found()))
