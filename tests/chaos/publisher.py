"""Publishes new versions while requests run, and knows what a name may have meant at any time."""

import random
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from adapter_store.store import AdapterStore
from tests.chaos.world import Content

TENANT = "public"
ALIAS = "stable"
PERIOD_S = 4.0
SETTLED_S = 3.0  # a version is asked for by its number once it is as old as this


@dataclass(frozen=True, slots=True)
class Meaning:
    """What a name means from some moment between the two times on, until the next one."""

    begun_s: float
    done_s: float
    version: int
    content: Content


class Publisher:
    """The only writer of the store. A name's contents take turns: each version differs from the
    one before, and an old content may come back under a new number."""

    def __init__(
        self, store: AdapterStore, base: str, contents: Mapping[str, Sequence[Content]], seed: int
    ) -> None:
        self.latest: dict[str, list[Meaning]] = {name: [] for name in contents}
        self.aliases: dict[str, list[Meaning]] = {name: [] for name in contents}
        self._store = store
        self._base = base
        self._contents = contents
        self._rng = random.Random(f"{seed}/publisher")
        self._lock = threading.Lock()  # guards the lists
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="publisher", daemon=True)
        self.failure: Exception | None = None

    def publish_first(self) -> None:
        for name in self._contents:
            self._publish(name)
            self._alias(name)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
        if self.failure is not None:
            raise self.failure

    @property
    def num_versions(self) -> int:
        return sum(map(len, self.latest.values()))

    # ---- what a name means ---------------------------------------------------------------

    def settled_versions(self, name: str) -> list[int]:
        limit_s = time.monotonic() - SETTLED_S
        with self._lock:
            return [m.version for m in self.latest[name] if m.done_s < limit_s]

    def meanings(self, name: str, since_s: float, until_s: float) -> list[Content]:
        """What `name`, `name@stable` or `name@3` may have meant in this time."""
        adapter_name, _, version = name.partition("@")
        with self._lock:
            history = list((self.aliases if version == ALIAS else self.latest)[adapter_name])
        if version.isdigit():
            return [m.content for m in history if m.version == int(version)]
        ends_s = [*(m.done_s for m in history[1:]), float("inf")]
        return [
            meaning.content
            for meaning, end_s in zip(history, ends_s, strict=True)
            if meaning.begun_s <= until_s and end_s >= since_s
        ]

    def replaced(self, name: str) -> list[tuple[Content, float]]:
        """All that `name` or `name@stable` has meant, and when it was replaced."""
        adapter_name, _, version = name.partition("@")
        if version.isdigit():
            return []
        with self._lock:
            history = list((self.aliases if version == ALIAS else self.latest)[adapter_name])
        ends_s = [*(m.done_s for m in history[1:]), float("inf")]
        return [(m.content, end_s) for m, end_s in zip(history, ends_s, strict=True)]

    # ---- the thread ----------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stop.wait(PERIOD_S * self._rng.uniform(0.5, 1.5)):
                name = self._rng.choice(sorted(self._contents))
                self._publish(name)
                if self._rng.random() < 0.5:
                    self._alias(name)
        except Exception as error:  # raised again by `stop`
            self.failure = error

    def _publish(self, name: str) -> None:
        history, contents = self.latest[name], self._contents[name]
        content = contents[len(history) % len(contents)]
        begun_s = time.monotonic()
        ref = self._store.publish(content.folder, TENANT, name, self._base)
        self._note(history, Meaning(begun_s, time.monotonic(), ref.version, content))

    def _alias(self, name: str) -> None:
        latest = self.latest[name][-1]
        begun_s = time.monotonic()
        self._store.alias(TENANT, name, ALIAS, latest.version)
        done = Meaning(begun_s, time.monotonic(), latest.version, latest.content)
        self._note(self.aliases[name], done)

    def _note(self, history: list[Meaning], meaning: Meaning) -> None:
        with self._lock:
            history.append(meaning)
