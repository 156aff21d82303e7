"""One download per adapter, nothing visible unverified, nothing pinned evicted, never too much."""

import fcntl
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from adapter_store.disk_cache import DiskCache
from adapter_store.errors import AdapterTooLarge, CacheFull, SourceUnavailable, StoreCorrupt
from adapter_store.file_lock import FileLock
from adapter_store.layout import WEIGHTS_NAME
from adapter_store.manifest import CONFIG_NAME, MANIFEST_NAME
from tests.adapter_store.synthetic import synthetic


class Blobs:
    """Adapters by digest, and how often each was downloaded. `before` runs at every file."""

    def __init__(self, num: int, nbytes: Callable[[int], int] = lambda _: 100) -> None:
        made = [synthetic(n, nbytes(n)) for n in range(num)]
        self.files = {manifest.digest: files for manifest, files in made}
        self.digests = list(self.files)
        self.downloads: Counter[str] = Counter()
        self.before: Callable[[str, Path], object] = lambda name, path: None

    def size(self, digest: str) -> int:
        return sum(len(data) for data in self.files[digest].values())

    def ensure(self, cache: DiskCache, digest: str) -> Path:
        def fetch(name: str, path: Path) -> None:
            self.downloads[digest] += name == MANIFEST_NAME
            self.before(name, path)
            path.write_bytes(self.files[digest][name])

        return cache.ensure(digest, fetch)

    def is_whole(self, folder: Path) -> bool:
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        return files == self.files[folder.name]


@pytest.fixture
def blobs() -> Blobs:
    return Blobs(6)


@pytest.fixture
def new_cache(tmp_path: Path, blobs: Blobs) -> Callable[[int], DiskCache]:
    """Make a cache with room for this many adapters; every use is later than the one before."""
    ticks = count(10**18)
    one = max(blobs.size(digest) for digest in blobs.digests)
    return lambda num: DiskCache(tmp_path / "cache", num * one, lambda: next(ticks))


later_ns = count(2 * 10**18)


def corrupt(folder: Path, name: str = WEIGHTS_NAME) -> None:
    """Flip a bit; the file's time changes, though files may change faster than clocks tick."""
    raw = bytearray((folder / name).read_bytes())
    raw[-1] ^= 1
    (folder / name).write_bytes(raw)
    os.utime(folder / name, ns=(time_ns := next(later_ns), time_ns))


# ---- one download ------------------------------------------------------------------------------


def test_an_adapter_is_downloaded_once(new_cache: Callable[[int], DiskCache], blobs: Blobs) -> None:
    cache = new_cache(2)
    folders = {blobs.ensure(cache, blobs.digests[0]) for _ in range(3)}
    assert len(folders) == 1
    assert blobs.is_whole(folders.pop())
    assert blobs.downloads == {blobs.digests[0]: 1}


def test_threads_that_want_the_same_adapter_share_one_download(
    new_cache: Callable[[int], DiskCache], blobs: Blobs
) -> None:
    caches = [new_cache(6), new_cache(6)]  # two caches of one folder, as two processes would be
    start = threading.Barrier(8)

    def want(n: int) -> list[bool]:
        start.wait()
        return [blobs.is_whole(blobs.ensure(caches[n % 2], d)) for d in blobs.digests]

    with ThreadPoolExecutor(8) as pool:
        assert all(all(whole) for whole in pool.map(want, range(8)))
    assert blobs.downloads == dict.fromkeys(blobs.digests, 1)
    caches[0].check_integrity()


ENSURE = """
import sys
from pathlib import Path
from adapter_store.disk_cache import DiskCache
from tests.adapter_store.synthetic import synthetic
root, log = Path(sys.argv[1]), sys.argv[2]
blobs = [synthetic(n) for n in range(8)]
cache = DiskCache(root, 10**6)
print("ready", flush=True)
sys.stdin.readline()
for manifest, files in blobs:
    def fetch(name, path):
        with open(log, "a") as file:
            file.write(f"{manifest.digest}/{name}\\n")
        path.write_bytes(files[name])
    folder = cache.ensure(manifest.digest, fetch)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == files
"""


def test_processes_that_want_the_same_adapter_share_one_download(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ENSURE, str(tmp_path / "cache"), str(tmp_path / "log")]
    pipe = subprocess.PIPE
    processes = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(2)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        process.communicate(timeout=60)
    assert [process.returncode for process in processes] == [0, 0]
    fetched = (tmp_path / "log").read_text().split()
    assert len(fetched) == len(set(fetched)) == 8 * 3


# ---- only what is verified ---------------------------------------------------------------------


def test_nothing_is_visible_before_it_is_complete(
    new_cache: Callable[[int], DiskCache], blobs: Blobs
) -> None:
    cache = new_cache(2)
    seen: list[bool] = []
    blobs.before = lambda name, path: seen.append(cache.contains(blobs.digests[0]))
    blobs.ensure(cache, blobs.digests[0])
    assert seen == [False] * 3
    assert cache.contains(blobs.digests[0])


@pytest.mark.parametrize("name", [MANIFEST_NAME, WEIGHTS_NAME])
def test_a_damaged_download_is_refused_and_leaves_nothing(
    name: str, new_cache: Callable[[int], DiskCache], blobs: Blobs
) -> None:
    cache = new_cache(2)
    digest = blobs.digests[0]
    whole = blobs.files[digest]
    blobs.files[digest] = whole | {name: whole[name][:-1]}
    with pytest.raises(StoreCorrupt, match=digest):
        blobs.ensure(cache, digest)
    assert cache.digests() == []
    cache.check_integrity()
    blobs.files[digest] = whole
    assert blobs.is_whole(blobs.ensure(cache, digest))


def test_a_fetch_that_fails_leaves_nothing_and_may_be_tried_again(
    new_cache: Callable[[int], DiskCache], blobs: Blobs
) -> None:
    cache = new_cache(1)

    def fail(name: str, path: Path) -> None:
        if name == WEIGHTS_NAME:
            path.write_bytes(b"half")
            raise SourceUnavailable("the store went away")

    blobs.before = fail
    with pytest.raises(SourceUnavailable, match="went away"):
        blobs.ensure(cache, blobs.digests[0])
    cache.check_integrity()
    blobs.before = lambda name, path: None
    assert blobs.is_whole(blobs.ensure(cache, blobs.digests[0]))


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest"])
def test_damage_on_disk_is_found_by_the_next_process_and_repaired(
    damage: str, new_cache: Callable[[int], DiskCache], blobs: Blobs
) -> None:
    folder = blobs.ensure(new_cache(2), blobs.digests[0])
    match damage:
        case "flip":
            corrupt(folder)
        case "truncate":
            (folder / WEIGHTS_NAME).write_bytes(b"")
        case "remove":
            (folder / WEIGHTS_NAME).unlink()
        case _:
            corrupt(folder, MANIFEST_NAME)
    cache = new_cache(2)
    assert blobs.is_whole(blobs.ensure(cache, blobs.digests[0]))
    assert blobs.downloads == {blobs.digests[0]: 2}
    cache.check_integrity()


@pytest.mark.parametrize("name", [MANIFEST_NAME, CONFIG_NAME, WEIGHTS_NAME])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "unreadable"])
def test_damage_on_disk_is_found_at_the_next_use_and_repaired(
    name: str, damage: str, new_cache: Callable[[int], DiskCache], blobs: Blobs
) -> None:
    cache = new_cache(2)
    path = blobs.ensure(cache, blobs.digests[0]) / name
    assert cache.find(blobs.digests[0]) == path.parent
    match damage:
        case "flip":
            corrupt(path.parent, name)
        case "truncate":
            path.write_bytes(b"")
        case "remove":
            path.unlink()
        case _:
            path.unlink()
            path.mkdir()
    assert cache.find(blobs.digests[0]) is None
    assert blobs.is_whole(blobs.ensure(cache, blobs.digests[0]))
    assert blobs.downloads == {blobs.digests[0]: 2}
    cache.check_integrity()


def test_damage_that_leaves_size_and_time_is_found_once_the_folder_is_distrusted(
    new_cache: Callable[[int], DiskCache], blobs: Blobs
) -> None:
    cache = new_cache(2)
    digest = blobs.digests[0]
    path = blobs.ensure(cache, digest) / WEIGHTS_NAME
    before_ns = path.stat().st_mtime_ns
    corrupt(path.parent)
    os.utime(path, ns=(before_ns, before_ns))
    assert not blobs.is_whole(blobs.ensure(cache, digest))
    cache.distrust(digest)
    assert blobs.is_whole(blobs.ensure(cache, digest))
    cache.distrust(digest)
    assert blobs.is_whole(blobs.ensure(cache, digest))
    assert blobs.downloads == {digest: 2}


def test_looking_for_an_adapter_downloads_nothing(
    new_cache: Callable[[int], DiskCache], blobs: Blobs
) -> None:
    cache = new_cache(2)
    assert cache.find(blobs.digests[0]) is None
    folder = blobs.ensure(cache, blobs.digests[0])
    assert new_cache(2).find(blobs.digests[0]) == folder
    assert blobs.downloads == {blobs.digests[0]: 1}


def test_an_intact_folder_is_not_downloaded_again_by_the_next_process(
    new_cache: Callable[[int], DiskCache], blobs: Blobs
) -> None:
    blobs.ensure(new_cache(2), blobs.digests[0])
    blobs.ensure(new_cache(2), blobs.digests[0])
    assert blobs.downloads == {blobs.digests[0]: 1}


# ---- eviction ----------------------------------------------------------------------------------


def test_the_least_recently_used_goes_first_even_after_a_restart(
    new_cache: Callable[[int], DiskCache], blobs: Blobs
) -> None:
    a, b, c, d, *_ = blobs.digests
    cache = new_cache(3)
    for digest in (a, b, c, a):
        blobs.ensure(cache, digest)
    cache = new_cache(3)
    blobs.ensure(cache, d)
    assert cache.digests() == [c, a, d]


def test_a_pinned_adapter_is_not_evicted(
    new_cache: Callable[[int], DiskCache], blobs: Blobs
) -> None:
    a, b, c, *_ = blobs.digests
    cache = new_cache(2)
    with cache.pinned(a):
        for digest in (a, b, c):
            blobs.ensure(cache, digest)
        assert cache.digests() == [a, c]
    blobs.ensure(cache, b)
    assert cache.digests() == [c, b]


def test_a_pin_holds_in_other_processes_too(
    new_cache: Callable[[int], DiskCache], blobs: Blobs
) -> None:
    a, b, *_ = blobs.digests
    ours, theirs = new_cache(1), new_cache(1)
    theirs.pin(a)
    blobs.ensure(theirs, a)
    with pytest.raises(CacheFull, match=b):
        blobs.ensure(ours, b)
    assert not ours.evict(a)
    theirs.unpin(a)
    blobs.ensure(ours, b)
    assert ours.digests() == theirs.digests() == [b]


def test_evicting_a_pinned_adapter_is_refused(
    new_cache: Callable[[int], DiskCache], blobs: Blobs
) -> None:
    cache = new_cache(2)
    digest = blobs.digests[0]
    blobs.ensure(cache, digest)
    cache.pin(digest)
    cache.pin(digest)
    cache.unpin(digest)
    assert not cache.evict(digest)
    cache.unpin(digest)
    assert cache.evict(digest)
    assert not cache.evict(digest)
    assert cache.digests() == []


def test_unpinning_what_is_not_pinned_is_an_error(
    new_cache: Callable[[int], DiskCache], blobs: Blobs
) -> None:
    with pytest.raises(ValueError, match="is not pinned"):
        new_cache(1).unpin(blobs.digests[0])


def test_an_adapter_larger_than_the_cache_is_refused_and_evicts_nothing(tmp_path: Path) -> None:
    blobs = Blobs(2, lambda n: 100 + 10_000 * n)
    small, large = blobs.digests
    cache = DiskCache(tmp_path, blobs.size(large) - 1)
    blobs.ensure(cache, small)
    with pytest.raises(AdapterTooLarge, match=f"{large} has {blobs.size(large)} bytes"):
        blobs.ensure(cache, large)
    assert cache.digests() == [small]
    cache.check_integrity()


def test_a_cache_full_of_pins_says_so(new_cache: Callable[[int], DiskCache], blobs: Blobs) -> None:
    cache = new_cache(2)
    for digest in blobs.digests[:2]:
        cache.pin(digest)
        blobs.ensure(cache, digest)
    with pytest.raises(CacheFull, match="pinned or being downloaded"):
        blobs.ensure(cache, blobs.digests[2])
    cache.check_integrity()


def test_downloads_in_flight_count_as_used(
    new_cache: Callable[[int], DiskCache], blobs: Blobs
) -> None:
    a, b, *_ = blobs.digests
    cache = new_cache(1)
    other = Blobs(6)

    def meanwhile(name: str, path: Path) -> None:
        if name == WEIGHTS_NAME:
            with pytest.raises(CacheFull):
                other.ensure(cache, b)

    blobs.before = meanwhile
    blobs.ensure(cache, a)
    assert other.downloads == {b: 1}
    cache.check_integrity()


def test_a_smaller_bound_is_obeyed_from_the_start(
    new_cache: Callable[[int], DiskCache], blobs: Blobs
) -> None:
    cache = new_cache(4)
    for digest in blobs.digests[:4]:
        blobs.ensure(cache, digest)
    assert new_cache(2).digests() == blobs.digests[2:4]


# ---- crashes -----------------------------------------------------------------------------------


def test_leftovers_of_a_crash_are_removed_at_start(
    tmp_path: Path, new_cache: Callable[[int], DiskCache], blobs: Blobs
) -> None:
    new_cache(1)
    partial, locks = tmp_path / "cache" / ".partial", tmp_path / "cache" / ".locks"
    for name in (f"{blobs.digests[0]}.0", f"{blobs.digests[1]}.4096", "trash.0123"):
        (partial / name).mkdir()
        (partial / name / WEIGHTS_NAME).write_bytes(b"half")
    for name in (f"{blobs.digests[0]}.fetch", f"{blobs.digests[2]}.pin", "room"):
        (locks / name).touch()
    new_cache(1).check_integrity()
    assert not list(locks.iterdir())


def test_a_download_in_progress_survives_the_start_of_another_process(
    new_cache: Callable[[int], DiskCache], blobs: Blobs
) -> None:
    blobs.before = lambda name, path: new_cache(2)
    cache = new_cache(2)
    assert blobs.is_whole(blobs.ensure(cache, blobs.digests[0]))


def test_a_process_that_dies_while_downloading_blocks_no_other(
    tmp_path: Path, new_cache: Callable[[int], DiskCache], blobs: Blobs
) -> None:
    script = """
import os, sys
from pathlib import Path
from adapter_store.disk_cache import DiskCache
cache = DiskCache(Path(sys.argv[1]), 10**6)
cache.pin(sys.argv[2])
cache.ensure(sys.argv[2], lambda name, path: os._exit(7))
"""
    cache, digest = new_cache(1), blobs.digests[0]
    command = [sys.executable, "-c", script, str(tmp_path / "cache"), digest]
    assert subprocess.run(command, check=False).returncode == 7
    assert blobs.is_whole(blobs.ensure(cache, digest))
    assert cache.evict(digest)


@pytest.mark.parametrize("digest", ["", "..", "a" * 63, "A" * 64, "../" + "a" * 61])
def test_what_is_not_a_digest_is_refused(
    digest: str, new_cache: Callable[[int], DiskCache]
) -> None:
    cache = new_cache(1)
    for use in (cache.pin, cache.evict, cache.contains, lambda d: cache.ensure(d, lambda *_: None)):
        with pytest.raises(ValueError, match="not a digest"):
            use(digest)


# ---- locks -------------------------------------------------------------------------------------


def test_a_lock_file_lives_as_long_as_its_last_holder(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    first = FileLock.acquire(path, shared=True)
    second = FileLock.acquire(path, shared=True, wait=False)
    assert first is not None
    assert second is not None
    assert FileLock.acquire(path, wait=False) is None
    first.release()
    assert path.exists()
    assert FileLock.acquire(path, wait=False) is None
    second.release()
    assert not path.exists()


def test_a_lock_is_never_held_on_a_file_that_its_last_holder_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lock"
    flock = fcntl.flock
    removals = iter([True])

    def removed_before_it_is_locked(descriptor: int, mode: int) -> None:
        if next(removals, False):
            path.unlink()
        flock(descriptor, mode)

    monkeypatch.setattr(fcntl, "flock", removed_before_it_is_locked)
    lock = FileLock.acquire(path)
    assert lock is not None
    assert FileLock.acquire(path, wait=False) is None
    lock.release()


def test_an_exclusive_lock_has_one_holder_at_a_time(tmp_path: Path) -> None:
    inside: list[int] = []
    most: list[int] = []

    def enter(n: int) -> None:
        for _ in range(50):
            lock = FileLock.acquire(tmp_path / "lock")
            assert lock is not None
            inside.append(n)
            most.append(len(inside))
            inside.remove(n)
            lock.release()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(enter, range(4)))
    assert set(most) == {1}
    assert not os.listdir(tmp_path)


# ---- a brute-force model -----------------------------------------------------------------------


def test_random_operations_agree_with_a_simple_model(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    sizes = (100, 700, 300, 100, 2500, 900)
    blobs = Blobs(6, lambda n: sizes[n])
    max_bytes = blobs.size(blobs.digests[4]) - 1  # the fifth never fits
    digests = st.sampled_from(blobs.digests)

    class Machine(RuleBasedStateMachine):
        """The cache, and what must be in it: a list in the order of use."""

        def __init__(self) -> None:
            super().__init__()
            self.root = tmp_path_factory.mktemp("cache")
            self.ticks = count(10**18)
            self.expected_downloads: Counter[str] = Counter()
            self.order: list[str] = []
            self.pins: Counter[str] = Counter()
            self.corrupted: set[str] = set()
            blobs.downloads.clear()
            self.cache = self.open()

        def open(self) -> DiskCache:
            return DiskCache(self.root, max_bytes, lambda: next(self.ticks))

        @rule(digest=digests)
        def ensure(self, digest: str) -> None:
            if digest in self.order and digest in self.corrupted:
                self.order.remove(digest)
            if digest not in self.order:
                self.corrupted.discard(digest)
                self.expected_downloads[digest] += 1
                if error := self.make_room(blobs.size(digest)):
                    with pytest.raises(error):
                        blobs.ensure(self.cache, digest)
                    return
                self.order.append(digest)
            folder = blobs.ensure(self.cache, digest)
            self.order.remove(digest)
            self.order.append(digest)
            assert blobs.is_whole(folder)

        def make_room(self, nbytes: int) -> type[Exception] | None:
            if nbytes > max_bytes:
                return AdapterTooLarge
            for digest in [d for d in self.order if not self.pins[d]]:
                if self.used() + nbytes <= max_bytes:
                    break
                self.forget(digest)
            return CacheFull if self.used() + nbytes > max_bytes else None

        def used(self) -> int:
            return sum(blobs.size(digest) for digest in self.order)

        def forget(self, digest: str) -> None:
            self.order.remove(digest)
            self.corrupted.discard(digest)

        @rule(digest=digests)
        def pin(self, digest: str) -> None:
            self.cache.pin(digest)
            self.pins[digest] += 1

        @rule(digest=digests)
        def unpin(self, digest: str) -> None:
            if self.pins[digest]:
                self.cache.unpin(digest)
                self.pins[digest] -= 1
            else:
                with pytest.raises(ValueError, match="not pinned"):
                    self.cache.unpin(digest)

        @rule(digest=digests)
        def evict(self, digest: str) -> None:
            possible = digest in self.order and not self.pins[digest]
            assert self.cache.evict(digest) == possible
            if possible:
                self.forget(digest)

        @rule(digest=digests)
        def corrupt(self, digest: str) -> None:
            if digest in self.order:
                corrupt(self.root / digest)
                self.corrupted ^= {digest}

        @rule()
        def restart(self) -> None:
            for digest in self.pins.elements():
                self.cache.unpin(digest)
            self.pins.clear()
            (self.root / ".partial" / f"{blobs.digests[0]}.0").mkdir()
            self.cache = self.open()

        @invariant()
        def the_cache_holds_what_the_list_says(self) -> None:
            assert self.cache.digests() == self.order
            assert blobs.downloads == self.expected_downloads
            self.cache.check_integrity()

        def teardown(self) -> None:
            for digest in self.pins.elements():
                self.cache.unpin(digest)

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=60,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
