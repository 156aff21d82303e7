"""What became of the requests: a Record each while they are open, columns of numbers afterwards."""

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from deployments.simulator.workload import Arrival


@dataclass(slots=True)
class Record:
    """Times in seconds since the start of the simulation; None while they have not come."""

    arrival: Arrival
    replica: str = ""
    first_token_s: float | None = None
    last_token_s: float = 0.0
    num_tokens: int = 0
    num_cached_tokens: int = 0
    longest_gap_s: float = 0.0
    is_finished: bool = False

    def take(self, num_tokens: int, now_s: float, num_cached_tokens: int | None) -> None:
        if self.first_token_s is None:
            self.first_token_s = now_s
            self.num_cached_tokens = num_cached_tokens or 0
        else:
            self.longest_gap_s = max(self.longest_gap_s, now_s - self.last_token_s)
        self.last_token_s = now_s
        self.num_tokens += num_tokens

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token_s is None else self.first_token_s - self.arrival.time_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time of a token after the first one."""
        if not self.is_finished or self.num_tokens < 2:
            return None
        assert self.first_token_s is not None
        return (self.last_token_s - self.first_token_s) / (self.num_tokens - 1)


class Stretch(NamedTuple):
    """Steps in a row: when the first and the last end, and the longest time between two ends."""

    first_s: float
    last_s: float
    gap_s: float
    num_steps: int


def take_run(records: Iterable[Record], stretch: Stretch) -> None:
    """Give each record one token, not its first one, of each of these steps."""
    first_s, last_s, longest_s, num_steps = stretch
    for record in records:
        gap_s = first_s - record.last_token_s
        if longest_s > gap_s:
            gap_s = longest_s
        if gap_s > record.longest_gap_s:
            record.longest_gap_s = gap_s
        record.last_token_s = last_s
        record.num_tokens += num_steps


def _doubles() -> "array[float]":
    return array("d")


@dataclass(slots=True)
class Outcomes:
    """Columns over requests that count, in the order of their ends; eight bytes a number."""

    begin_s: float  # requests that came before it do not count
    is_good: Callable[[Record], bool]
    num_requests: int = 0
    num_finished: int = 0
    num_good: int = 0
    num_tokens: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    ttft_s: "array[float]" = field(default_factory=_doubles)
    tpot_s: "array[float]" = field(default_factory=_doubles)
    gap_s: "array[float]" = field(default_factory=_doubles)

    def add(self, record: Record) -> None:
        """Take a request that has ended, or that is open when the simulation is over."""
        if record.arrival.time_s < self.begin_s:
            return
        self.num_requests += 1
        self.num_tokens += record.num_tokens
        self.num_prompt_tokens += record.arrival.num_prompt_tokens
        self.num_cached_tokens += record.num_cached_tokens
        if (ttft_s := record.ttft_s) is not None:
            self.ttft_s.append(ttft_s)
        if not record.is_finished:
            return
        self.num_finished += 1
        self.num_good += self.is_good(record)
        self.gap_s.append(record.longest_gap_s)
        if (tpot_s := record.tpot_s) is not None:
            self.tpot_s.append(tpot_s)


@dataclass(slots=True)
class Timeline:
    """Columns over time: replicas that take requests, and the requests that they have."""

    time_s: "array[float]" = field(default_factory=_doubles)
    replicas: "array[float]" = field(default_factory=_doubles)
    requests: "array[float]" = field(default_factory=_doubles)
    max_over_mean: "array[float]" = field(default_factory=_doubles)  # while requests come
    is_counting: bool = True

    def begin_to_count(self) -> None:
        """Forget how uneven the load was before now."""
        del self.max_over_mean[:]

    def end_counting(self) -> None:
        """No request comes any more: the last ones say nothing of the router."""
        self.is_counting = False

    def add(self, now_s: float, replicas: int, loads: Sequence[int]) -> None:
        total = sum(loads)
        self.time_s.append(now_s)
        self.replicas.append(replicas)
        self.requests.append(total)
        if total and self.is_counting:
            self.max_over_mean.append(max(loads) * len(loads) / total)
