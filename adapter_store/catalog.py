"""Apply the records of the log to the state of a registry. No I/O, no clock, no locks.

Invariant: the state depends on the sequence of records alone, so two processes that have read the
same records have the same state. A record that does not fit the state is refused.

A retired version may be restored, a deleted one may not. A `collect` record begins a generation.
From then on, files that no live version has are garbage for good: an upload of an earlier
generation is used only while a live version has it.
"""

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from adapter_store.aliases import Alias, AliasView, from_record
from adapter_store.errors import AdapterNotFound, InvalidName, StoreCorrupt
from adapter_store.history import AdapterHistory, Version
from adapter_store.names import LATEST, AdapterRecord, AdapterRef, Place, check_alias, split_name
from adapter_store.verdict import Verdict

Key = tuple[str, str]  # a tenant and the name of an adapter
_MISFITS = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, InvalidName)


class Catalog:
    """The adapters of all tenants, as of the first `num_records` records of the log."""

    def __init__(self) -> None:
        self.num_records = 0
        self.head: str | None = None  # SHA-256 of the last record as it was written, if known
        self.generation = 0  # collections so far
        self._adapters: dict[tuple[str, str], AdapterHistory] = {}
        self._names: dict[str, list[str]] = {}  # by tenant, sorted
        self._live: dict[str, list[int]] = {}  # digest: generations, one for each live version
        self._own_files: dict[str, list[str]] = {}  # by digest, where they are known
        self._verdicts: dict[str, Verdict] = {}  # by digest, of what is live
        self._num_live: Counter[str] = Counter()  # versions, by tenant
        self._live_bytes: Counter[str] = Counter()  # of these
        self._changed: set[Key] | None = None  # since a snapshot was begun

    # ---- reading -------------------------------------------------------------------------------

    def resolve(self, tenant: str, full_name: str, base: str | None = None) -> AdapterRef:
        """Return the live version meant by name[@version|alias].

        `latest`, or no selector, means the newest for this base. Raises InvalidName,
        AdapterNotFound.
        """
        name, selector = split_name(full_name)
        history = self._adapters.get((tenant, name))
        if history is None:
            raise AdapterNotFound(f"tenant {tenant} has no adapter {name!r}")
        version = self._select(history, selector, base)
        if version is None or not history.is_live(version):
            suffix = f" for base {base}" if base is not None else ""
            raise AdapterNotFound(f"tenant {tenant} has no live adapter {full_name!r}{suffix}")
        found = history.versions[version - 1]
        if base not in (None, found.base):
            raise AdapterNotFound(
                f"{full_name!r} is an adapter of base {found.base}, not of {base}"
            )
        return _ref(tenant, name, version, found)

    def alias_view(self, tenant: str, full_name: str) -> AliasView | None:
        """Return the alias behind a name's @; None if there is none. Raises InvalidName."""
        name, selector = split_name(full_name)
        history = self._adapters.get((tenant, name))
        found = None if history is None else history.aliases.get(str(selector))
        if history is None or found is None:
            return None
        return AliasView(
            tenant,
            name,
            str(selector),
            found.record,
            self._live_shares(tenant, name, history, found.weights),
            self._live_shares(tenant, name, history, found.before),
            found.trial,
            found.began,
            found.flip,
            found.moved_s,
        )

    def trials(self) -> set[int]:
        """Return the records with which the trials that go on began."""
        histories = self._adapters.values()
        aliases = (alias for history in histories for alias in history.aliases.values())
        return {alias.began for alias in aliases if alias.trial is not None}

    def _live_shares(
        self, tenant: str, name: str, history: AdapterHistory, weights: Mapping[int, float]
    ) -> Sequence[tuple[AdapterRef, float]]:
        return [
            (_ref(tenant, name, version, history.versions[version - 1]), weight)
            for version, weight in weights.items()
            if history.is_live(version)
        ]

    def list(self, tenant: str | None = None) -> Iterable[AdapterRecord]:
        """Yield the live versions in the order of tenant, name and version."""
        for owner in sorted(self._names) if tenant is None else [tenant]:
            yield from self.list_from(owner)

    def list_from(
        self, tenant: str, first_name: str = "", with_retired: bool = False
    ) -> Iterable[AdapterRecord]:
        """Yield a tenant's live versions by name and version, from this name on.

        What is not asked for costs nothing, however many adapters there are.
        """
        names = self._names.get(tenant, [])
        for position in range(bisect_left(names, first_name), len(names)):
            name = names[position]
            yield from self._records(tenant, name, self._adapters[tenant, name], with_retired)

    def tenants_from(self, first: str) -> Sequence[str]:
        """List the tenants that have ever published, from this name on."""
        return sorted([tenant for tenant in self._names if tenant >= first])

    def versions_of(self, tenant: str, name: str) -> Sequence[AdapterRecord]:
        """List all versions of a name, retired ones included."""
        history = self._adapters.get((tenant, name), AdapterHistory())
        return list(self._records(tenant, name, history, with_retired=True))

    def _records(
        self, tenant: str, name: str, history: AdapterHistory, with_retired: bool
    ) -> Iterable[AdapterRecord]:
        latest = history.latest(None)
        for version, entry in enumerate(history.versions, start=1):
            if entry.is_retired and not with_retired:
                continue
            aliases = sorted(a for a, found in history.aliases.items() if version in found.weights)
            yield AdapterRecord(
                tenant=tenant,
                name=name,
                version=version,
                digest=entry.digest,
                base=entry.base,
                lora_rank=entry.lora_rank,
                nbytes=entry.nbytes,
                published_s=entry.published_s,
                aliases=(LATEST, *aliases) if version == latest else tuple(aliases),
                generation=entry.generation,
                verdict=self._verdicts.get(entry.digest),
                state=entry.state,
                published_by=entry.published_by,
            )

    def find_digest(self, tenant: str, name: str, digest: str) -> int | None:
        """Return the newest live version of this name with this content, or None."""
        history = self._adapters.get((tenant, name), AdapterHistory())
        for version in range(len(history.versions), 0, -1):
            if history.is_live(version) and history.versions[version - 1].digest == digest:
                return version
        return None

    def latest(self, tenant: str, name: str, base: str) -> int | None:
        """Return the newest live version of this name for this base, or None."""
        return self._adapters.get((tenant, name), AdapterHistory()).latest(base)

    def num_versions(self, tenant: str, name: str) -> int:
        """Count the versions of a name, retired ones included."""
        return len(self._adapters.get((tenant, name), AdapterHistory()).versions)

    def num_live(self, tenant: str) -> int:
        """Count the live versions of a tenant."""
        return self._num_live[tenant]

    def live_bytes(self, tenant: str) -> int:
        """Count the bytes of a tenant's live versions, each as if it were alone."""
        return self._live_bytes[tenant]

    def live_versions(self, tenant: str, name: str) -> tuple[int, ...]:
        """List the live versions of a name, in order."""
        versions = range(1, self.num_versions(tenant, name) + 1)
        return tuple(v for v in versions if self._adapters[tenant, name].is_live(v))

    # ---- files ---------------------------------------------------------------------------------

    def place_of(self, digest: str) -> Place:
        """Return where files with this digest are, or where to put them if they are not needed yet.

        That is where a live version has them, or the present generation.
        """
        return Place(digest, max(self._live.get(digest, [self.generation])))

    def own_files_of(self, digest: str) -> tuple[str, ...] | None:
        """List the files that an adapter brings beside its weights; None if it is not known."""
        found = self._own_files.get(digest)
        return None if found is None else tuple(found)

    def is_live(self, digest: str) -> bool:
        """Check that any live version has this content."""
        return digest in self._live

    def verdict_of(self, digest: str) -> Verdict | None:
        """Return what an engine has found out about this content."""
        return self._verdicts.get(digest)

    def is_live_at(self, place: Place) -> bool:
        """Check that a live version has its files in this place."""
        return place.generation in self._live.get(place.digest, ())

    def may_use(self, place: Place) -> bool:
        """Check that what lies in this place cannot have been removed, so a record may name it."""
        return place.generation == self.generation or self.is_live_at(place)

    def places_retired_by(self, numbers: Collection[int | None]) -> set[Place]:
        """Return where the files of the versions lie that these records retired."""
        versions = (each for history in self._adapters.values() for each in history.versions)
        return {each.place for each in versions if each.retired_by in numbers}

    # ---- writing -------------------------------------------------------------------------------

    def apply(self, record: Mapping[str, Any], sha256: str | None = None) -> None:
        """Apply the next record of the log; StoreCorrupt, and no change, if it does not fit."""
        number = self.num_records + 1
        try:
            {
                "publish": self._publish,
                "alias": self._alias,
                "flip": self._flip,
                "retire": self._retire,
                "restore": self._restore,
                "delete": self._delete,
                "collect": self._collect,
                "verdict": self._judge,
            }[record["kind"]](record)
        except _MISFITS as error:
            raise StoreCorrupt(f"log record {number} does not make sense: {error!r}") from error
        self.num_records, self.head = number, sha256
        if self._changed is not None and "name" in record:
            self._changed.add((record["tenant"], record["name"]))

    def to_data(self) -> dict[str, Any]:
        """Return the whole state as JSON values: the content of a snapshot."""
        adapters = [self.adapter_data(key) for key in sorted(self._adapters)]
        return {"adapters": adapters, **self.other_data()}

    # A snapshot of many adapters is made a few at a time. What changes meanwhile is made again.

    def begin_snapshot(self) -> Sequence[Key]:
        """Note from now on which adapters change; return the keys of all there are."""
        self._changed = set()
        return list(self._adapters)

    def end_snapshot(self) -> Collection[Key]:
        """Return the keys of those that have changed or come since."""
        changed, self._changed = self._changed or set(), None
        return [key for key in changed if key in self._adapters]

    def adapter_data(self, key: Key) -> dict[str, Any]:
        """Return one adapter as JSON values."""
        return {"tenant": key[0], "name": key[1], **self._adapters[key].to_data()}

    def other_data(self) -> dict[str, Any]:
        """Return what is of no adapter alone as JSON values."""
        return {
            "format": 1,
            "num_records": self.num_records,
            "head": self.head,
            "generation": self.generation,
            "verdicts": {d: v.to_data() for d, v in sorted(self._verdicts.items())},
        }

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> "Catalog":
        """Restore a state from `to_data`; KeyError, TypeError or ValueError for other data."""
        if data["format"] != 1:
            raise ValueError(f"format {data['format']!r} is not 1")
        catalog = cls()
        catalog.num_records = int(data["num_records"])
        catalog.head = data.get("head")
        catalog.generation = int(data.get("generation", 0))
        for entry in data["adapters"]:
            versions = [Version(**version) for version in entry["versions"]]
            aliases = {name: Alias.from_data(data) for name, data in entry["aliases"].items()}
            history = AdapterHistory(versions, aliases)
            catalog._add(entry["tenant"], entry["name"], history)
        for digest, verdict in data.get("verdicts", {}).items():
            catalog._verdicts[digest] = Verdict.from_data(verdict)
        return catalog

    def _publish(self, record: Mapping[str, Any]) -> None:
        key = (str(record["tenant"]), str(record["name"]))
        version = Version(
            digest=str(record["digest"]),
            base=str(record["base"]),
            lora_rank=int(record["lora_rank"]),
            nbytes=int(record["nbytes"]),
            published_s=float(record["published_s"]),
            generation=int(record.get("generation", 0)),
            own_files=record.get("own_files"),
            vocab_size=int(record.get("vocab_size", 0)),
            published_by=str(record.get("by", "")),
        )
        if record["version"] != self.num_versions(*key) + 1:
            raise ValueError(f"version {record['version']} does not follow")
        if key not in self._adapters:
            self._add(*key, AdapterHistory())
        self._adapters[key].versions.append(version)
        self._note_own_files(version)
        self._enliven(key[0], version)

    def _add(self, tenant: str, name: str, history: AdapterHistory) -> None:
        self._adapters[tenant, name] = history
        insort(self._names.setdefault(tenant, []), name)
        for version in history.versions:
            self._note_own_files(version)
            if not version.is_retired:
                self._enliven(tenant, version)

    def _enliven(self, tenant: str, version: Version) -> None:
        self._live.setdefault(version.digest, []).append(version.generation)
        self._num_live[tenant] += 1
        self._live_bytes[tenant] += version.nbytes

    def _note_own_files(self, version: Version) -> None:
        if version.own_files is not None:
            self._own_files[version.digest] = version.own_files

    def _alias(self, record: Mapping[str, Any]) -> None:
        history = self._adapters[record["tenant"], record["name"]]
        weights, trial = from_record(record)
        if not all(history.is_live(version) for version in weights):
            raise ValueError(f"not all of the versions {sorted(weights)} are live")
        alias = check_alias(record["alias"])
        before = history.aliases.get(alias, Alias({}))
        history.aliases[alias] = before.moved(
            weights, trial, self.num_records + 1, float(record.get("at_s", 0.0))
        )

    def _flip(self, record: Mapping[str, Any]) -> None:
        """Note how new versions were waited for; of what has moved since it says nothing."""
        aliases = self._adapters[record["tenant"], record["name"]].aliases
        found = aliases[record["alias"]]
        if found.record == record["of"]:
            aliases[record["alias"]] = found.flipped(str(record["outcome"]))

    def _retire(self, record: Mapping[str, Any]) -> None:
        history = self._adapters[record["tenant"], record["name"]]
        numbers: set[int] = set(record["versions"])
        if not all(history.is_live(number) for number in numbers):
            raise ValueError(f"not all of the versions {record['versions']} are live")
        for number in numbers:
            self._withdraw(record["tenant"], history.versions[number - 1])

    def _withdraw(self, tenant: str, version: Version) -> None:
        version.is_retired, version.retired_by = True, self.num_records + 1
        self._num_live[tenant] -= 1
        self._live_bytes[tenant] -= version.nbytes
        generations = self._live[version.digest]
        generations.remove(version.generation)
        if not generations:
            del self._live[version.digest]
            self._verdicts.pop(version.digest, None)

    def _restore(self, record: Mapping[str, Any]) -> None:
        key = (str(record["tenant"]), str(record["name"]))
        history = self._adapters[key]
        number, generation = int(record["version"]), int(record["generation"])
        version = history.versions[number - 1] if number >= 1 else None
        if version is None or version.state != "retired":
            raise ValueError(f"version {number} is not retired")
        if not self.may_use(Place(version.digest, generation)):
            raise ValueError(f"files of generation {generation} may have been removed")
        version.is_retired, version.retired_by = False, 0
        version.generation = generation
        self._enliven(key[0], version)

    def _delete(self, record: Mapping[str, Any]) -> None:
        history = self._adapters[record["tenant"], record["name"]]
        numbers: set[int] = set(record["versions"])
        if not numbers or not all(1 <= n <= len(history.versions) for n in numbers):
            raise ValueError(f"not all of the versions {record['versions']} were published")
        chosen = [history.versions[number - 1] for number in sorted(numbers)]
        if any(version.is_deleted for version in chosen):
            raise ValueError(f"not all of the versions {record['versions']} are left")
        for version in chosen:
            if not version.is_retired:
                self._withdraw(record["tenant"], version)
            version.is_deleted = True

    def _judge(self, record: Mapping[str, Any]) -> None:
        """Keep the latest verdict; one on what was retired meanwhile says nothing."""
        if record["digest"] in self._live:
            self._verdicts[record["digest"]] = Verdict.from_data(record["verdict"])

    def _collect(self, record: Mapping[str, Any]) -> None:
        if record["generation"] != self.generation + 1:
            raise ValueError(f"generation {record['generation']} does not follow")
        self.generation += 1

    @staticmethod
    def _select(history: AdapterHistory, selector: int | str, base: str | None) -> int | None:
        if isinstance(selector, int):
            return selector
        if selector == LATEST:
            return history.latest(base)
        return history.meant_by(selector)


def _ref(tenant: str, name: str, version: int, found: Version) -> AdapterRef:
    return AdapterRef(
        tenant,
        name,
        version,
        found.digest,
        found.base,
        vocab_size=found.vocab_size,
        lora_rank=found.lora_rank,
    )
