"""Ranks replicas for a request by predicted time to first token.

Pure functions of plain data. Reported figures are up to a second old, so each router keeps an
OptimisticView, which adds what this router itself has sent since.

    predicted TTFT = queued tokens / tokens per second
                   + the adapter's load time from the nearest tier that has it
                   + uncached prompt tokens / tokens per second

Ties are broken by rendezvous hashing (Thaler and Ravishankar 1998) of the adapter, so new adapters
spread evenly and every router sends the same adapter to the same replica.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace


@dataclass(frozen=True, slots=True)
class RoutingCosts:
    """Constants of the prediction. Load times are seconds for a typical adapter."""

    tokens_per_s: float = 2000.0
    disk_load_s: float = 0.2
    remote_load_s: float = 1.0
    full_penalty_s: float = 1.0  # added for a replica whose batch or KV cache is full
    resolution_s: float = 0.05  # predictions closer than this count as equal


@dataclass(frozen=True, slots=True)
class ReplicaFigures:
    """Figures that a replica reports."""

    num_received: int = (
        0  # requests since start; makes any two reports with traffic between them differ
    )
    queued_tokens: int = 0
    num_requests: int = 0
    max_num_seqs: int = 1
    kv_used: float = 0.0  # 0 to 1
    device_adapters: frozenset[str] = frozenset()
    disk_adapters: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class RoutedRequest:
    """The routing inputs of a request. `adapter_digest` is empty for the base model."""

    request_id: str
    num_prompt_tokens: int
    adapter_digest: str = ""
    avoid: tuple[str, ...] = ()  # replicas that have already failed this request


@dataclass(slots=True)
class _Sent:
    """Requests sent to one replica since its last report, and adapters sent before that.

    A report is taken some time before it arrives, so it may lack adapters sent in between; these
    are remembered until the next one.
    """

    tokens: int = 0
    requests: int = 0
    adapters: dict[str, None] = field(default_factory=dict[str, None])
    earlier_adapters: dict[str, None] = field(default_factory=dict[str, None])


class OptimisticView:
    """The reported figures plus what was sent since. One per router; not thread-safe.

    A replica that has not reported yet is taken to have the figures `unheard`.
    """

    def __init__(self, unheard: ReplicaFigures) -> None:
        self._unheard = unheard
        self._reported: dict[str, ReplicaFigures] = {}
        self._sent: dict[str, _Sent] = {}

    def report(self, replica_id: str, figures: ReplicaFigures) -> None:
        """Take a report: it replaces what was added since the last one, except adapters.

        A report equal to the last one is ignored.
        """
        if self._reported.get(replica_id) == figures:
            return
        self._reported[replica_id] = figures
        sent = self._sent.pop(replica_id, None)
        if sent is not None and sent.adapters:
            self._sent[replica_id] = _Sent(earlier_adapters=sent.adapters)

    def keep(self, replica_ids: Iterable[str]) -> None:
        """Forget every other replica."""
        wanted = dict.fromkeys(replica_ids)
        for known in (self._reported, self._sent):
            for gone in [r for r in known if r not in wanted]:
                del known[gone]

    def sent(self, replica_id: str, request: RoutedRequest) -> None:
        sent = self._sent.setdefault(replica_id, _Sent())
        sent.tokens += request.num_prompt_tokens
        sent.requests += 1
        if request.adapter_digest:
            sent.adapters[request.adapter_digest] = None

    def figures(self, replica_id: str) -> ReplicaFigures:
        reported = self._reported.get(replica_id, self._unheard)
        sent = self._sent.get(replica_id)
        if sent is None:
            return reported
        return replace(
            reported,
            queued_tokens=reported.queued_tokens + sent.tokens,
            num_requests=reported.num_requests + sent.requests,
            device_adapters=reported.device_adapters.union(sent.adapters, sent.earlier_adapters),
        )


def rank(
    replica_ids: Sequence[str], request: RoutedRequest, view: OptimisticView, costs: RoutingCosts
) -> list[str]:
    """Order all replicas, best first. Those to avoid come last, rather than not at all."""

    def order(replica_id: str) -> tuple[bool, int, int, bytes]:
        figures = view.figures(replica_id)
        predicted_s = predicted_ttft_s(figures, request, costs)
        return (
            replica_id in request.avoid,
            round(predicted_s / costs.resolution_s),
            figures.num_requests if not request.adapter_digest else 0,
            _rendezvous(request.adapter_digest or request.request_id, replica_id),
        )

    return sorted(replica_ids, key=order)


def predicted_ttft_s(figures: ReplicaFigures, request: RoutedRequest, costs: RoutingCosts) -> float:
    """Predicted seconds to the first token if the request goes to this replica."""
    tokens = figures.queued_tokens + request.num_prompt_tokens
    return (
        tokens / costs.tokens_per_s
        + _load_s(figures, request.adapter_digest, costs)
        + costs.full_penalty_s * _fullness(figures)
    )


def _fullness(figures: ReplicaFigures) -> float:
    """0 if there is room, else the number of requests relative to the batch, at least 1."""
    taken = figures.num_requests / figures.max_num_seqs
    return max(taken, 1.0) if taken >= 1.0 or figures.kv_used >= 1.0 else 0.0


def _load_s(figures: ReplicaFigures, adapter_digest: str, costs: RoutingCosts) -> float:
    if not adapter_digest or adapter_digest in figures.device_adapters:
        return 0.0
    return costs.disk_load_s if adapter_digest in figures.disk_adapters else costs.remote_load_s


def _rendezvous(key: str, replica_id: str) -> bytes:
    return hashlib.blake2b(f"{len(key)}:{key}{replica_id}".encode(), digest_size=8).digest()
