"""Alias: what name@alias means: one version, or several that share its requests. No I/O.

Of two versions one may be on trial: then the requests that both answer are compared, and the alias
is moved to the better one by itself (`Trial` holds the bounds of that).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from adapter_store.errors import InvalidShares
from adapter_store.names import AdapterRef

MAX_VERSIONS = 8  # that share an alias
MAX_WEIGHT = 1e6
RANGES: Mapping[str, tuple[float, float]] = {
    "max_regression": (0.001, 1.0),
    "max_length_change": (0.001, 1.0),
    "alpha": (1e-6, 0.5),
    "min_requests": (1, 10**6),
    "max_requests": (1, 10**8),
    "ttft_s": (0.001, 3600.0),
}


@dataclass(frozen=True, slots=True)
class Trial:
    """How a version, the candidate, is judged beside the other one of its alias."""

    candidate: int
    max_regression: float = 0.05  # of a rate between 0 and 1, such as that of failed requests
    max_length_change: float = 0.15  # of the mean of n / (n + 128) over answers of n tokens
    alpha: float = 0.05  # how often a candidate that is no worse may be rolled back, at most
    min_requests: int = 50  # of each version before anything is concluded
    max_requests: int = 5000  # of the candidate; then what is undecided stays as it is
    ttft_s: float = 2.0  # first tokens that come later are late

    def __post_init__(self) -> None:
        for name, (least, most) in RANGES.items():
            value = getattr(self, name)
            if not least <= value <= most:
                raise InvalidShares(f"{name} must be in [{least:g}, {most:g}], not {value!r}")
        if self.max_requests < self.min_requests:
            raise InvalidShares(
                f"max_requests {self.max_requests} must be at least min_requests "
                f"{self.min_requests}"
            )

    def to_data(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)

    @staticmethod
    def from_data(data: Mapping[str, Any]) -> "Trial":
        """Undo `to_data`; KeyError, TypeError or ValueError for other data."""
        return Trial(
            candidate=int(data["candidate"]),
            max_regression=float(data["max_regression"]),
            max_length_change=float(data["max_length_change"]),
            alpha=float(data["alpha"]),
            min_requests=int(data["min_requests"]),
            max_requests=int(data["max_requests"]),
            ttft_s=float(data["ttft_s"]),
        )


@dataclass(frozen=True, slots=True)
class Alias:
    """The meaning of one alias as of its last record."""

    weights: Mapping[int, float]  # by version
    record: int = 0  # number of the record; 0: it is not known
    before: Mapping[int, float] = field(default_factory=dict[int, float])  # until that record
    trial: Trial | None = None
    began: int = 0  # record with which the trial of these two versions began
    flip: str = ""  # how the new versions were waited for, once that is known
    moved_s: float = 0.0  # seconds since 1970, by the clock of who wrote the record

    @property
    def versions(self) -> Sequence[int]:
        """The versions, the one with the largest weight first."""
        return sorted(self.weights, key=lambda version: (-self.weights[version], version))

    def moved(
        self, weights: Mapping[int, float], trial: Trial | None, record: int, at_s: float
    ) -> "Alias":
        """Return what it is after a record. A trial goes on while its two versions are the same."""
        goes_on = (
            trial is not None
            and self.trial is not None
            and trial.candidate == self.trial.candidate
            and set(weights) == set(self.weights)
        )
        began = self.began if goes_on else record
        began = 0 if trial is None else began
        return Alias(weights, record, self.weights, trial, began, moved_s=at_s)

    def flipped(self, how: str) -> "Alias":
        """Return it with a note on how its new versions were waited for."""
        return replace(self, flip=how)

    def to_data(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "weights": _to_json(self.weights),
            "record": self.record,
            "before": _to_json(self.before),
            "trial": None if self.trial is None else self.trial.to_data(),
            "began": self.began,
            "flip": self.flip,
            "moved_s": self.moved_s,
        }

    @staticmethod
    def from_data(data: "Mapping[str, Any] | int") -> "Alias":
        """Undo `to_data`, or read a version alone, as earlier snapshots have it."""
        if isinstance(data, int):
            return Alias({data: 1.0})
        trial = data["trial"]
        return Alias(
            weights=weights_from_data(data["weights"]),
            record=int(data["record"]),
            before=weights_from_data(data["before"]) if data["before"] else {},
            trial=None if trial is None else Trial.from_data(trial),
            began=int(data["began"]),
            flip=str(data["flip"]),
            moved_s=float(data["moved_s"]),
        )


@dataclass(frozen=True, slots=True)
class AliasView:
    """An alias with its versions resolved: of `shares` and `before` those that are live."""

    tenant: str
    name: str
    alias: str
    record: int
    shares: Sequence[tuple[AdapterRef, float]]
    before: Sequence[tuple[AdapterRef, float]]
    trial: Trial | None
    began: int
    flip: str
    moved_s: float

    @property
    def text(self) -> str:
        """The alias as logs and messages name it."""
        return f"{self.tenant}/{self.name}@{self.alias}"


def check_weights(weights: Mapping[int, float], trial: Trial | None = None) -> None:
    """Raise InvalidShares unless these versions can share an alias, and be tried if they are to."""
    if not 1 <= len(weights) <= MAX_VERSIONS:
        raise InvalidShares(f"an alias has 1 to {MAX_VERSIONS} versions, not {len(weights)}")
    for version, weight in weights.items():
        if not (math.isfinite(weight) and 0 <= weight <= MAX_WEIGHT):
            raise InvalidShares(
                f"the weight of version {version} must be in [0, {MAX_WEIGHT:g}], not {weight!r}"
            )
    if not sum(weights.values()) > 0:
        raise InvalidShares("the weights of an alias must not all be 0")
    if trial is None:
        return
    if len(weights) != 2 or not all(weights.values()):
        raise InvalidShares("a trial needs two versions, each with a weight above 0")
    if trial.candidate not in weights:
        raise InvalidShares(f"the candidate {trial.candidate} is none of the alias' versions")


def check_one_base(name: str, refs: Sequence[AdapterRef]) -> None:
    """Raise InvalidShares unless these versions are of one base."""
    if len({ref.base for ref in refs}) > 1:
        listed = ", ".join(f"{ref.version} of base {ref.base[:12]}" for ref in refs)
        raise InvalidShares(f"versions of {name} that share an alias must have one base: {listed}")


def weights_from_data(data: Mapping[str, Any]) -> dict[int, float]:
    """Read weights by version from JSON. Raises InvalidShares, which is a ValueError."""
    weights = {int(version): float(weight) for version, weight in data.items()}
    check_weights(weights)
    return dict(sorted(weights.items()))


def _to_json(weights: Mapping[int, float]) -> dict[str, float]:
    return {str(version): weight for version, weight in sorted(weights.items())}


def to_record(weights: Mapping[int, float], trial: Trial | None) -> dict[str, Any]:
    """Return the fields of a log record: one version is written as such."""
    if len(weights) == 1:
        return {"version": next(iter(weights))}
    fields: dict[str, Any] = {"versions": _to_json(weights)}
    return fields if trial is None else fields | {"trial": trial.to_data()}


def from_record(record: Mapping[str, Any]) -> tuple[dict[int, float], Trial | None]:
    """Undo `to_record`; KeyError, TypeError or ValueError for other data."""
    if "versions" not in record:
        return {int(record["version"]): 1.0}, None
    weights = weights_from_data(record["versions"])
    trial = Trial.from_data(record["trial"]) if "trial" in record else None
    check_weights(weights, trial)
    return weights, trial
