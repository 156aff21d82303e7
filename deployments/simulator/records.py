"""Record: what became of one request."""

from dataclasses import dataclass

from deployments.simulator.workload import Arrival
from engine.scheduler.request import Request


@dataclass(slots=True)
class Record:
    """Times in seconds since the start of the simulation; None while they have not come."""

    arrival: Arrival
    replica: str = ""
    first_token_s: float | None = None
    last_token_s: float | None = None
    num_tokens: int = 0
    num_cached_tokens: int = 0
    longest_gap_s: float = 0.0
    is_finished: bool = False

    def take(self, num_tokens: int, now_s: float, request: Request) -> None:
        if self.first_token_s is None:
            self.first_token_s = now_s
            self.num_cached_tokens = request.num_cached_tokens or 0
        elif self.last_token_s is not None:
            self.longest_gap_s = max(self.longest_gap_s, now_s - self.last_token_s)
        self.last_token_s = now_s
        self.num_tokens += num_tokens
        self.is_finished = request.finish_reason is not None

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token_s is None else self.first_token_s - self.arrival.time_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time of a token after the first one."""
        if not self.is_finished or self.num_tokens < 2:
            return None
        assert self.first_token_s is not None and self.last_token_s is not None
        return (self.last_token_s - self.first_token_s) / (self.num_tokens - 1)
