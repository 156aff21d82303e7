"""Whatever stops or overtakes a collection, every live name leads to the same, whole files."""

import random
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from adapter_store import followed_log
from adapter_store.audit import MAX_AUDITED, AuditLog
from adapter_store.blobs import file_key
from adapter_store.errors import AdapterNotFound, FilesRemoved, SourceUnavailable
from adapter_store.layout import WEIGHTS_NAME
from adapter_store.names import Place
from tests.adapter_store.memory_store import Memory, MemoryStore
from tests.adapter_store.publisher import Publisher, prepare_synthetic, served
from tests.adapter_store.roots import Root
from tests.adapter_store.synthetic import synthetic

REPOSITORY = Path(__file__).parents[2]
FILES = [synthetic(seed)[1] for seed in range(4)]
DIGESTS = [synthetic(seed)[0].digest for seed in range(4)]


@pytest.fixture(autouse=True)
def short_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(followed_log, "SNAPSHOT_EVERY", 4)


# ---- a stop anywhere ---------------------------------------------------------------------------


class Stop(BaseException):
    """The process ends here."""


def stop_at(store: MemoryStore, number: int) -> None:
    """Let the process end instead of sending its request of this number, from 0."""
    num_sent = 0

    def hook(method: str, key: str) -> None:
        nonlocal num_sent
        if num_sent == number:
            raise Stop
        num_sent += 1

    store.hook = hook


@pytest.fixture
def used(tmp_path: Path) -> Memory:
    """A store with live, retired, shared and unfinished uploads, of two generations."""
    memory = Memory()
    one = Publisher(MemoryStore(memory), tmp_path)
    one.publish("a", 0)
    one.publish("b", 1)
    one.registry.retire("t", "b")
    one.collect()
    one.publish("b", 1)
    one.publish("b", 2)
    one.registry.alias("t", "a", "prod", 1)
    one.registry.alias("t", "b", "prod", 2)
    one.registry.retire("t", "b@3")
    for n in range(8):
        one.publish("c", n % 2)
    one.registry.retire("t", "c")
    one.objects.put(file_key(Place(DIGESTS[3], 1), WEIGHTS_NAME), b"half")
    one.objects.put(file_key(Place(DIGESTS[3], 0), WEIGHTS_NAME), b"half")
    return memory


def stops(
    used: Memory, folder: Path, act: Callable[[Publisher], object]
) -> Generator[tuple[int, Memory], None, None]:
    """Yield the store as it is after the act was stopped at each of its requests, and at none."""
    number, has_stopped = 0, True
    while has_stopped:
        memory = used.copy()
        process = Publisher(store := MemoryStore(memory), folder)
        stop_at(store, number)
        try:
            act(process)
            has_stopped = False
        except Stop:
            number += 1
        yield number, memory


def test_a_collection_that_stops_anywhere_leaves_the_same_names(
    used: Memory, tmp_path: Path
) -> None:
    before = served(MemoryStore(used))
    assert before["a@prod"] == DIGESTS[0] and before["b@prod"] == DIGESTS[1]
    number = 0
    for number, memory in stops(used, tmp_path, lambda process: process.collect()):
        assert served(MemoryStore(memory)) == before, number
        next_one = Publisher(MemoryStore(memory), tmp_path)
        assert any(not next_one.collect().objects for _ in range(4)), number
        assert served(MemoryStore(memory)) == before, number
        assert sum(key.startswith("blobs/") for key in memory.objects) == 2 * 3
        next_one.publish("d", 2)
        assert served(MemoryStore(memory)) == before | {"d@1": DIGESTS[2], "d": DIGESTS[2]}
    assert number > 30


def test_a_publisher_that_stops_anywhere_leaves_whole_names_beside_a_collection(
    used: Memory, tmp_path: Path
) -> None:
    before = served(MemoryStore(used))
    after = before | {"e@1": DIGESTS[3], "e": DIGESTS[3]}
    number = 0
    for number, memory in stops(used, tmp_path, lambda process: process.publish("e", 3)):
        assert served(MemoryStore(memory)) in (before, after), number
        Publisher(MemoryStore(memory), tmp_path).collect()
        assert served(MemoryStore(memory)) in (before, after), number
        Publisher(MemoryStore(memory), tmp_path).publish("e", 3)
        assert served(MemoryStore(memory)) == after, number
    assert number > 8


# ---- several at once ---------------------------------------------------------------------------


class Turns:
    """Lets one of several threads run at a time, up to one of its requests, as a seed says."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self._gates: dict[str, threading.Semaphore] = {}
        self._back = threading.Semaphore(0)
        self._threads: list[threading.Thread] = []
        self._errors: list[BaseException] = []

    def add(self, name: str, act: Callable[[Callable[[str, str], None]], object]) -> None:
        """Add a thread; `act` gets the hook that its store must call before each request."""
        gate = self._gates[name] = threading.Semaphore(0)

        def wait(method: str, key: str) -> None:
            self._back.release()
            gate.acquire()

        def run() -> None:
            gate.acquire()
            try:
                act(wait)
            except BaseException as error:
                self._errors.append(error)
            del self._gates[name]
            self._back.release()

        self._threads.append(threading.Thread(target=run, name=name, daemon=True))

    def run(self) -> None:
        """Run all threads to their ends; raise the first of their errors."""
        for thread in self._threads:
            thread.start()
        while self._gates and not self._errors:
            chosen = self.random.choice(sorted(self._gates))
            for _ in range(self.random.choice([1, 1, 2, 5, 20, 80])):  # the others sleep that long
                if chosen in self._gates:
                    self._gates[chosen].release()
                    self._back.acquire()
        if self._errors:
            raise self._errors[0]


@dataclass
class Owner:
    """Publishes under a name of its own and one that it shares, and knows what its own must be."""

    name: str
    memory: Memory
    process: Publisher
    random: random.Random
    versions: list[tuple[str, bool]] = field(default_factory=list[tuple[str, bool]])
    aliases: dict[str, int] = field(default_factory=dict[str, int])
    deleted: set[int] = field(default_factory=set[int])
    num_restored: int = 0

    def live(self) -> list[int]:
        return [n for n, (_, is_live) in enumerate(self.versions, start=1) if is_live]

    def step(self) -> None:
        seed, live = self.random.randrange(len(DIGESTS)), self.live()
        actions = ["publish", "publish", "share", "alias", "retire", "retire", "restore", "delete"]
        action = self.random.choice(actions)
        if action == "share":
            with unknown_outcomes():
                self.process.publish("shared", seed)
        elif action == "publish" or not live:
            self.publish(seed)
        elif action == "alias":
            self.alias(self.random.choice(live))
        elif action == "restore":
            self.restore(self.random.randrange(len(self.versions)) + 1)
        elif action == "delete":
            self.delete(self.random.randrange(len(self.versions)) + 1)
        else:
            self.retire(self.random.choice(live))
        self.check()

    def publish(self, seed: int) -> None:
        with unknown_outcomes() as outcome:
            self.process.publish(self.name, seed)
        live = self.live()
        is_new = not live or self.versions[live[-1] - 1][0] != DIGESTS[seed]
        if is_new and self.happened(outcome, len(self.versions) + 1 in self.shown()):
            self.versions.append((DIGESTS[seed], True))

    def alias(self, version: int) -> None:
        with unknown_outcomes() as outcome:
            self.process.registry.alias("t", self.name, "prod", version)
        if self.happened(outcome, "prod" in self.shown().get(version, ("", ()))[1]):
            self.aliases["prod"] = version

    def retire(self, version: int) -> None:
        with unknown_outcomes() as outcome:
            self.process.registry.retire("t", f"{self.name}@{version}")
        if self.happened(outcome, version not in self.shown()):
            self.versions[version - 1] = (self.versions[version - 1][0], False)

    def restore(self, version: int) -> None:
        full_name = f"{self.name}@{version}"
        if version in self.deleted:
            with pytest.raises(AdapterNotFound, match="was deleted"):
                self.process.restore(full_name)
            return
        try:
            with unknown_outcomes() as outcome:
                self.process.restore(full_name)
        except FilesRemoved:
            assert version not in self.shown()
            return
        if self.happened(outcome, version in self.shown()):
            self.num_restored += version not in self.live()
            self.versions[version - 1] = (self.versions[version - 1][0], True)

    def delete(self, version: int) -> None:
        if version in self.deleted:
            return
        with unknown_outcomes() as outcome:
            self.process.registry.delete("t", f"{self.name}@{version}")
        records = self.process.registry.versions_of("t", self.name)
        if self.happened(outcome, records[version - 1].state == "deleted"):
            self.deleted.add(version)
            self.versions[version - 1] = (self.versions[version - 1][0], False)

    def happened(self, outcome: list[str], is_shown: bool) -> bool:
        """Whether a change was made: always, unless its outcome is not known."""
        return is_shown if outcome else True

    def shown(self) -> Mapping[int, tuple[str, tuple[str, ...]]]:
        """What the store lists under the owner's name: digest and aliases by version."""
        self.process.registry.refresh()
        listed = [r for r in self.process.registry.list() if r.name == self.name]
        return {r.version: (r.digest, r.aliases) for r in listed}

    def check(self) -> None:
        """The store shows what this owner alone can have changed, and its files are whole."""
        shown, live = self.shown(), self.live()
        expected = {n: (self.versions[n - 1][0], self.names(n)) for n in live}
        assert shown == expected
        for digest, _ in shown.values():
            place = self.process.registry.place_of(digest)
            for name, data in FILES[DIGESTS.index(digest)].items():
                assert self.memory.objects[file_key(place, name)][0] == data

    def names(self, version: int) -> tuple[str, ...]:
        live = self.live()
        latest = ("latest",) if version == live[-1] else ()
        return latest + tuple(a for a, target in self.aliases.items() if target == version)


@contextmanager
def unknown_outcomes() -> Generator[list[str], None, None]:
    """Note the one error that leaves it open whether a change was made."""
    noted: list[str] = []
    try:
        yield noted
    except SourceUnavailable as error:
        assert "whether it counts is not known" in str(error)
        noted.append(str(error))


def run_at_once(seed: int, folder: Path) -> tuple[int, int]:
    """Run owners, collectors and readers at once; return numbers of removals and restorations."""
    memory, turns = Memory(), Turns(seed)
    Publisher(MemoryStore(memory), folder).publish("anchor", 0)
    owners: list[Owner] = []
    num_removed = 0

    def own(name: str, hook: Callable[[str, str], None]) -> None:
        process = Publisher(MemoryStore(memory, hook), folder)
        owner = Owner(name, memory, process, random.Random(f"{seed}{name}"))
        owners.append(owner)
        for _ in range(10):
            owner.step()

    def collect(hook: Callable[[str, str], None]) -> None:
        nonlocal num_removed
        process = Publisher(MemoryStore(memory, hook), folder)
        for _ in range(6):
            with unknown_outcomes():
                num_removed += len(process.collect().objects)

    def read(hook: Callable[[str, str], None]) -> None:
        process = Publisher(MemoryStore(memory, hook), folder)
        for n in range(12):
            if n % 4 == 3:
                process = Publisher(MemoryStore(memory, hook), folder)
            process.registry.refresh()
            assert process.registry.damage is None
            assert process.registry.resolve("t", "anchor").digest == DIGESTS[0]

    for number in range(3):
        turns.add(f"own{number}", lambda hook, name=f"own{number}": own(name, hook))
    for number in range(2):
        turns.add(f"collect{number}", collect)
        turns.add(f"read{number}", read)
    turns.run()
    Publisher(MemoryStore(memory), folder).collect()
    found = served(MemoryStore(memory))
    for owner in owners:
        owner.process.objects.hook = lambda *_: None  # type: ignore[attr-defined]
        owner.check()
        for version in owner.live():
            assert found[f"{owner.name}@{version}"] == owner.versions[version - 1][0]
    assert found["anchor"] == DIGESTS[0]
    last = owners[0].process.registry.num_records
    entries = AuditLog(MemoryStore(memory)).read(last, MAX_AUDITED, None).entries
    assert [entry.number for entry in entries] == list(range(last, 0, -1)), "entries were lost"
    return num_removed, sum(owner.num_restored for owner in owners)


def test_processes_that_overtake_each_other_lose_nothing(tmp_path: Path) -> None:
    results = [run_at_once(seed, tmp_path) for seed in range(40)]
    assert sum(num_removed for num_removed, _ in results) > 500
    assert sum(num_restored for _, num_restored in results) > 20


@pytest.mark.slow
def test_processes_that_overtake_each_other_lose_nothing_for_long(tmp_path: Path) -> None:
    for seed in range(1000, 4000):
        run_at_once(seed, tmp_path)


# ---- real processes ----------------------------------------------------------------------------

OWN = """
import random, sys
from pathlib import Path
from adapter_store import followed_log
from adapter_store.errors import SourceUnavailable
from adapter_store.names import Place
from adapter_store.open_store import open_store
from tests.adapter_store.publisher import Publisher
from tests.adapter_store.synthetic import synthetic
followed_log.SNAPSHOT_EVERY = 4
root, folder, name, num_steps = sys.argv[1:]
one, chance, live, count = Publisher(open_store(root), Path(folder)), random.Random(name), {}, 0
for _ in range(int(num_steps)):
    seed = chance.randrange(4)
    digest = synthetic(seed)[0].digest
    expected = dict(live)
    if len(live) < 2 or chance.random() < 0.6:
        if not live or live[max(live)] != digest:
            expected[count + 1] = digest
        act = lambda: one.publish(name, seed)
    else:
        version = chance.choice(sorted(live))
        del expected[version]
        act = lambda: one.registry.retire("t", f"{name}@{version}")
    outcomes = [expected]
    try:
        act()
    except SourceUnavailable as error:
        assert "whether it counts is not known" in str(error)
        outcomes.append(live)
    one.registry.refresh()
    records = [record for record in one.registry.list() if record.name == name]
    found = {record.version: record.digest for record in records}
    assert found in outcomes, (found, outcomes)
    live, count = found, max([count, *found])
    for record in records:
        assert list(one.blobs.problems(Place(record.digest, record.generation), id)) == []
"""

COLLECT = """
import sys
from pathlib import Path
from adapter_store import followed_log
from adapter_store.errors import SourceUnavailable
from adapter_store.open_store import open_store
from tests.adapter_store.publisher import Publisher
followed_log.SNAPSHOT_EVERY = 4
root, folder, stop = sys.argv[1:]
one, num_removed = Publisher(open_store(root), Path(folder)), 0
while not Path(stop).exists():
    try:
        num_removed += len(one.collect().objects)
    except SourceUnavailable as error:
        assert "whether it counts is not known" in str(error)
print(num_removed)
"""


@pytest.mark.parametrize(
    ("root", "num_steps"),
    [
        ("file", 60),
        pytest.param("s3", 60, marks=[pytest.mark.slow, pytest.mark.timeout(1200)]),
    ],
    indirect=["root"],
)
def test_processes_that_publish_beside_collectors_lose_nothing(
    root: Root, num_steps: int, tmp_path: Path
) -> None:
    Publisher(root.open(), tmp_path / "files").publish("anchor", 0)
    for seed in range(4):
        prepare_synthetic(tmp_path / "files", seed)
    stop = tmp_path / "stop"

    def start(script: str, *arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", script, root.url, tmp_path / "files", *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            list(map(str, command)), cwd=REPOSITORY, stdout=pipe, stderr=pipe, text=True
        )

    owners = [start(OWN, f"own{n}", num_steps) for n in range(2)]
    collectors = [start(COLLECT, stop) for _ in range(2)]
    try:
        for process in owners:
            _, errors = process.communicate()
            assert process.returncode == 0, errors
    finally:
        stop.touch()
    for process in collectors:
        output, errors = process.communicate()
        assert process.returncode == 0, errors
        assert int(output) > 0
    assert served(root.open())["anchor"] == DIGESTS[0]
