"""TrialCounts: what each process has counted of a trial, an object for each process.

They are sums that only grow, written again and again: a reader has all of a process, or what it had
a moment ago. Objects of a trial go with its end.
"""

from collections.abc import Sequence
from contextlib import suppress

from adapter_store.errors import AccessDenied, ObjectNotFound
from adapter_store.object_store import ObjectStore

TRIALS = "trials/"


class TrialCounts:
    """The counts in one object store. Holds no state."""

    def __init__(self, objects: ObjectStore) -> None:
        self._objects = objects

    def put(self, began: int, writer: str, counts: bytes) -> None:
        """Replace what a process has counted of the trial that began with this record."""
        self._objects.put(f"{_prefix(began)}{writer}.json", counts)

    def read(self, began: int, but: str = "") -> Sequence[bytes]:
        """Read what all processes have counted, but for one."""
        keys = [
            key for key in self._objects.list(_prefix(began)) if not key.endswith(f"/{but}.json")
        ]
        try:
            return self._objects.get_many(keys)
        except ObjectNotFound:  # another process has ended the trial
            return []

    def remove(self, began: int) -> None:
        """Remove the counts of a trial that is over; without the right to, they stay."""
        keys = self._objects.list(_prefix(began))
        with suppress(AccessDenied):
            self._objects.remove(keys)


def _prefix(began: int) -> str:
    return f"{TRIALS}{began:020}/"


def trial_of(key: str) -> int | None:
    """Return the record that the trial of an object began with; None for any other key."""
    number = key.removeprefix(TRIALS).partition("/")[0]
    return int(number) if number.isdecimal() else None
