"""ReplicaView: the figures that a replica reports, and what one router has sent to it since."""

from dataclasses import dataclass, replace

from deployments.policy.rendezvous import rendezvous_number

NO_ROOM_S = 1e6  # puts a replica without room after all others


@dataclass(frozen=True, slots=True)
class ReplicaFigures:
    """Figures that a replica reports. A rate or a time of 0 has not been measured."""

    num_received: int = (
        0  # requests since start; makes any two reports with traffic between them differ
    )
    queued_tokens: int = 0
    num_requests: int = 0
    max_num_seqs: int = 1
    kv_used: float = 0.0  # 0 to 1
    device_adapters: frozenset[str] = frozenset()  # in memory: they need no load
    disk_adapters: frozenset[str] = frozenset()
    tokens_per_s: float = 0.0  # of prompts, as its own steps have shown
    disk_load_s: float = 0.0  # of an adapter from its disk
    remote_load_s: float = 0.0  # of an adapter from the object store
    crowding_s: float = 0.0  # by which one request makes another's answer later


@dataclass(frozen=True, slots=True)
class Priors:
    """What holds for a replica that has not measured it."""

    tokens_per_s: float = 2000.0
    disk_load_s: float = 0.2
    remote_load_s: float = 1.0
    crowding_s: float = 0.03


class ReplicaView:
    """One replica, as one router sees it; plain attributes, since every decision reads them all.

    A report is taken some time before it arrives, so it may lack adapters sent in between; these
    are remembered until the next one. What was not measured is taken from the arguments.
    """

    __slots__ = (
        "_earlier_adapters",
        "_priors",
        "_sent_adapters",
        "crowding_s",
        "device_adapters",
        "disk_adapters",
        "disk_load_s",
        "fullness",
        "is_kv_full",
        "max_num_seqs",
        "num_requests",
        "num_sent",
        "number",
        "queued_tokens",
        "remote_load_s",
        "replica_id",
        "reported",
        "start_s",
        "token_s",
        "wait_s",
    )

    def __init__(self, replica_id: str, figures: ReplicaFigures, priors: Priors) -> None:
        self.replica_id = replica_id
        self.number = rendezvous_number(replica_id)
        self._priors = priors
        self._sent_adapters: set[str] = set()
        self._earlier_adapters: set[str] = set()
        self._take(figures)

    def report(self, figures: ReplicaFigures) -> None:
        self._earlier_adapters, self._sent_adapters = self._sent_adapters, set()
        self._take(figures)

    def _take(self, figures: ReplicaFigures) -> None:
        priors = self._priors
        self.reported, self.num_sent = figures, 0
        self.max_num_seqs = figures.max_num_seqs
        self.is_kv_full = figures.kv_used >= 1.0
        self.device_adapters: set[str] | frozenset[str] = figures.device_adapters
        if self._earlier_adapters:
            self.device_adapters = {*figures.device_adapters, *self._earlier_adapters}
        self.disk_adapters = figures.disk_adapters
        self.disk_load_s = figures.disk_load_s or priors.disk_load_s
        self.remote_load_s = figures.remote_load_s or priors.remote_load_s
        self.crowding_s = figures.crowding_s or priors.crowding_s
        self.token_s = 1 / (figures.tokens_per_s or priors.tokens_per_s)
        self._set_load(figures.queued_tokens, figures.num_requests)

    def _set_load(self, queued_tokens: float, num_requests: float) -> None:
        self.queued_tokens, self.num_requests = queued_tokens, num_requests
        self.wait_s = queued_tokens * self.token_s
        self.fullness = num_requests / self.max_num_seqs
        # One more request waits for the queue; it delays each of the others, and they delay it.
        self.start_s = self.wait_s + 2 * num_requests * self.crowding_s
        if self.is_kv_full:
            self.start_s += NO_ROOM_S

    def sent(self, num_tokens: int, adapter_digest: str, times: float = 1.0) -> None:
        """Add a request that was sent, and counts so many times."""
        self.num_sent += 1
        self._set_load(self.queued_tokens + times * num_tokens, self.num_requests + times)
        if adapter_digest and adapter_digest not in self.device_adapters:
            self._sent_adapters.add(adapter_digest)
            self.device_adapters = {*self.device_adapters, adapter_digest}

    def ended(self, num_tokens: int, times: float = 1.0) -> None:
        """Take back what was added for a request, or what the replica had reported of it."""
        queued = max(self.queued_tokens - times * num_tokens, 0.0)
        self._set_load(queued, max(self.num_requests - times, 0.0))

    def load_s(self, adapter_digest: str) -> float:
        """Predict how long the adapter takes to be on the device."""
        if adapter_digest in self.device_adapters:
            return 0.0
        return self.disk_load_s if adapter_digest in self.disk_adapters else self.remote_load_s

    def figures(self) -> ReplicaFigures:
        return replace(
            self.reported,
            queued_tokens=round(self.queued_tokens),
            num_requests=round(self.num_requests),
            device_adapters=frozenset(self.device_adapters),
        )
