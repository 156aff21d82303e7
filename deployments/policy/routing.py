"""Which replica a request goes to: the one that would give its first token soonest.

Pure functions of plain data. Figures that replicas report are up to a second old, so whoever
routes also keeps an OptimisticView: what it has itself sent where since then counts at once.

    predicted TTFT = queued tokens / tokens per second
                   + the adapter's load time from the nearest tier that has it
                   + uncached prompt tokens / tokens per second

Replicas with equal predictions are told apart by rendezvous hashing (Thaler and Ravishankar 1998)
of the adapter, so new adapters spread evenly and every router sends the same one the same way.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace


@dataclass(frozen=True, slots=True)
class RoutingCosts:
    """What the prediction is made of. Tier times are for a typical adapter, in seconds."""

    tokens_per_s: float = 2000.0
    disk_load_s: float = 0.2
    remote_load_s: float = 1.0
    full_penalty_s: float = 1.0  # a replica whose batch or KV cache is full
    resolution_s: float = 0.05  # predictions closer than this are equal


@dataclass(frozen=True, slots=True)
class ReplicaFigures:
    """What a replica says of itself."""

    num_received: int = 0  # requests ever; so figures after any traffic differ from those before
    queued_tokens: int = 0
    num_requests: int = 0
    max_num_seqs: int = 1
    kv_used: float = 0.0  # 0 to 1
    device_adapters: frozenset[str] = frozenset()
    disk_adapters: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class RoutedRequest:
    """What matters of a request. `adapter` is a digest; empty for the base model."""

    request_id: str
    num_prompt_tokens: int
    adapter_digest: str = ""
    avoid: tuple[str, ...] = ()  # replicas that failed it already


@dataclass(slots=True)
class _Sent:
    """What was routed to one replica since its last report, and which adapters before that.

    A report is taken some time before it arrives: what was sent meanwhile is in the next one.
    """

    tokens: int = 0
    requests: int = 0
    adapters: dict[str, None] = field(default_factory=dict[str, None])
    earlier_adapters: dict[str, None] = field(default_factory=dict[str, None])


class OptimisticView:
    """The reported figures, plus what was sent since. One per router; not thread-safe.

    Of a replica that has not reported yet `unheard` is assumed.
    """

    def __init__(self, unheard: ReplicaFigures) -> None:
        self._unheard = unheard
        self._reported: dict[str, ReplicaFigures] = {}
        self._sent: dict[str, _Sent] = {}

    def report(self, replica_id: str, figures: ReplicaFigures) -> None:
        """New figures replace the optimism; where adapters were sent is forgotten one later.

        Figures equal to the last ones are no news.
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
    """All replicas, best first. Those to avoid come last: better a doubtful one than none."""

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
    """Seconds from now to the first token, if the request went to this replica."""
    tokens = figures.queued_tokens + request.num_prompt_tokens
    return (
        tokens / costs.tokens_per_s
        + _load_s(figures, request.adapter_digest, costs)
        + costs.full_penalty_s * _fullness(figures)
    )


def _fullness(figures: ReplicaFigures) -> float:
    """0 where there is room; else 1, or how many times its batch its requests are."""
    taken = figures.num_requests / figures.max_num_seqs
    return max(taken, 1.0) if taken >= 1.0 or figures.kv_used >= 1.0 else 0.0


def _load_s(figures: ReplicaFigures, adapter_digest: str, costs: RoutingCosts) -> float:
    if not adapter_digest or adapter_digest in figures.device_adapters:
        return 0.0
    return costs.disk_load_s if adapter_digest in figures.disk_adapters else costs.remote_load_s


def _rendezvous(key: str, replica_id: str) -> bytes:
    return hashlib.blake2b(f"{len(key)}:{key}{replica_id}".encode(), digest_size=8).digest()
