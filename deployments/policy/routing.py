"""Chooses a replica for a request by predicted time to first token, within a bound on load.

    predicted TTFT = queued tokens / the replica's own tokens per second
                   + the adapter's load time from the nearest tier that has it
                   + prompt tokens that are not in its prefix cache / its tokens per second

Each adapter has a set of replicas: the first ones of its rendezvous order, as many as its share of
the traffic needs. A replica outside the set costs `spread_s` more, so that a short queue is no
reason to copy an adapter that is seldom used, and to evict another one for it.

The bound, with figures that are true: a request is never sent to a replica that would then have
more requests than max(ceil((1 + epsilon) * mean), min_load) or no room, while another has room. The
mean is that of all replicas with this request, in proportion to their sizes; there always is one
below it (Mirrokni, Thorup and Zadimoghaddam 2018). Reported figures are up to a second old, so a
router adds what it has sent since, and a replica may be above by what other routers sent meanwhile.

All that is known is kept in plain Python, and the clock is an argument.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from deployments.policy.demand import Demand
from deployments.policy.prefix_memory import PrefixMemory
from deployments.policy.rendezvous import Rendezvous, rendezvous_number
from deployments.policy.replica_view import Priors, ReplicaFigures, ReplicaView


@dataclass(frozen=True, slots=True)
class RoutingCosts:
    """Constants of the prediction."""

    priors: Priors = field(default_factory=Priors)
    resolution_s: float = 0.05  # predictions closer than this count as equal
    spread_s: float = 0.25  # added for a replica outside the adapter's set
    sticky_s: float = 0.1  # taken off for the replica of the request's session
    epsilon: float = 0.25  # how far above the mean a replica's load may be
    min_load: int = 4  # requests; below this a replica's load is no reason to go elsewhere
    set_share: float = 0.5  # of a replica's part of all requests, for which an adapter gets one


@dataclass(frozen=True, slots=True)
class RoutedRequest:
    """The routing inputs of a request. `adapter_digest` is empty for the base model.

    `prefix_keys` identify its prompt up to each whole chunk of PREFIX_CHUNK tokens; requests of
    equal keys share these tokens' KV.
    """

    request_id: str
    num_prompt_tokens: int
    adapter_digest: str = ""
    avoid: tuple[str, ...] = ()  # replicas that have already failed this request
    session: str = ""
    prefix_keys: tuple[int, ...] = ()


class Router:
    """Ranks replicas for requests, and remembers where it has sent them. Not thread-safe.

    A replica that has not reported yet is taken to have the figures `unheard`.
    """

    def __init__(self, costs: RoutingCosts, unheard: ReplicaFigures) -> None:
        self._costs = costs
        self._unheard = unheard
        self._views: dict[str, ReplicaView] = {}
        self._rendezvous = Rendezvous()
        self._prefixes = PrefixMemory()
        self._demand = Demand()

    def report(self, replica_id: str, figures: ReplicaFigures) -> None:
        """Take a report: it replaces what was added since the last one, except adapters.

        A report equal to the last one is ignored.
        """
        view = self._views.get(replica_id)
        if view is None:
            self._add(replica_id, figures)
        elif view.reported != figures:
            has_new_size = view.reported.max_num_seqs != figures.max_num_seqs
            view.report(figures)
            if has_new_size:
                self._set_weights()

    def keep(self, replica_ids: Iterable[str]) -> None:
        """Forget every other replica."""
        wanted = dict.fromkeys(replica_ids)
        gone = [replica_id for replica_id in self._views if replica_id not in wanted]
        for replica_id in gone:
            del self._views[replica_id]
            self._prefixes.forget(replica_id)
        if gone:
            self._set_weights()

    def figures(self, replica_id: str) -> ReplicaFigures:
        """Return a replica's figures, with what was sent to it since."""
        return self._views[replica_id].figures() if replica_id in self._views else self._unheard

    def sent(self, replica_id: str, request: RoutedRequest, now: float) -> None:
        self._view(replica_id).sent(request.num_prompt_tokens, request.adapter_digest)
        self._prefixes.sent(replica_id, request.prefix_keys)
        if request.adapter_digest:
            self._demand.add(request.adapter_digest, now)

    def ended(self, replica_id: str, num_tokens: int) -> None:
        """Note that a request of this many tokens has ended, which was sent by this router."""
        view = self._views.get(replica_id)
        if view is not None:
            view.ended(num_tokens)

    def rank(self, replica_ids: Sequence[str], request: RoutedRequest) -> list[str]:
        """Order all replicas, best first. Those to avoid come last, rather than not at all."""
        best, avoid = self.choose(replica_ids, request), request.avoid
        rest = [self._view(r) for r in replica_ids if r != best]
        rest.sort(key=lambda view: (view.replica_id in avoid, view.wait_s))
        return [best, *(view.replica_id for view in rest)]

    def choose(self, replica_ids: Sequence[str], request: RoutedRequest) -> str:
        """Return the best replica: one to avoid only if there is no other."""
        views = self._known(replica_ids)
        if request.avoid:
            views = [v for v in views if v.replica_id not in request.avoid] or views
        limits = self._limits(views)
        members = self.replica_set(request.adapter_digest) if request.adapter_digest else []
        if len(members) == 1:
            home = self._idle_home(members[0], request, limits)
            if home is not None and home in views:
                return home.replica_id
        fitting = [v for v in views if v.num_requests < limits[v.max_num_seqs] and not v.is_kv_full]
        fitting = fitting or [v for v in views if v.fullness < 1.0 and not v.is_kv_full] or views
        costs = self._predict(fitting, request, members)
        limit = min(costs) + self._costs.resolution_s
        equal = [view for view, cost in zip(fitting, costs, strict=True) if cost < limit]
        best = equal[0] if len(equal) == 1 else self._break_tie(equal, request, members)
        return best.replica_id

    def replica_set(self, adapter_digest: str) -> list[str]:
        """Return the replicas that should have an adapter, by its share of the requests."""
        order, views = self._rendezvous.order(adapter_digest), self._views.values()
        total = sum([view.num_requests for view in views])
        expected = self._demand.share(adapter_digest) * total
        part = self._costs.set_share * max(total / max(len(order), 1), 2 * self._costs.min_load)
        return order[: 1 + int(expected / part)]

    # ==== the choice ====

    def _limits(self, views: Sequence[ReplicaView]) -> dict[int, int]:
        """Return how many requests a replica may have before this one, by the size of its batch."""
        sizes = [view.max_num_seqs for view in views]
        total = sum([view.num_requests for view in views]) + 1
        per_seat, least = (1 + self._costs.epsilon) * total / sum(sizes), self._costs.min_load
        return {size: min(max(math.ceil(per_seat * size), least), size) for size in set(sizes)}

    def _idle_home(
        self, replica_id: str, request: RoutedRequest, limits: dict[int, int]
    ) -> ReplicaView | None:
        """Return the only replica of the adapter's set if no other one can be better."""
        digest = request.adapter_digest
        home = self._views.get(replica_id)
        if (
            home is None
            or digest not in home.device_adapters
            or home.is_kv_full
            or home.num_requests >= limits.get(home.max_num_seqs, 0)
            or home.wait_s + request.num_prompt_tokens * home.token_s > self._costs.spread_s
        ):
            return None
        return home

    def _predict(
        self, views: Sequence[ReplicaView], request: RoutedRequest, members: Sequence[str]
    ) -> list[float]:
        """Predict seconds to the first token at each replica, with what affinity adds to them."""
        tokens, digest = request.num_prompt_tokens, request.adapter_digest
        if digest:
            spread_s = self._costs.spread_s
            costs = [
                v.wait_s
                + tokens * v.token_s
                + (0.0 if digest in v.device_adapters else v.load_s(digest))
                + (0.0 if v.replica_id in members else spread_s)
                for v in views
            ]
        else:
            costs = [v.wait_s + tokens * v.token_s for v in views]
        self._take_off(costs, views, request, members)
        return costs

    def _take_off(
        self,
        costs: list[float],
        views: Sequence[ReplicaView],
        request: RoutedRequest,
        members: Sequence[str],
    ) -> None:
        """Take off what the replicas have computed before, and the session's bonus."""
        cached = self._prefixes.find(request.prefix_keys) if request.prefix_keys else {}
        sticky = self._session_home(request, members) if request.session else ""
        if not cached and not sticky:
            return
        for i, view in enumerate(views):
            tokens = min(cached.get(view.replica_id, 0), request.num_prompt_tokens)
            costs[i] -= tokens * view.token_s
            if view.replica_id == sticky:
                costs[i] -= self._costs.sticky_s

    def _session_home(self, request: RoutedRequest, members: Sequence[str]) -> str:
        if not request.adapter_digest:
            return self._rendezvous.order(request.session)[0]
        return members[rendezvous_number(request.session) % len(members)]

    def _break_tie(
        self, views: Sequence[ReplicaView], request: RoutedRequest, members: Sequence[str]
    ) -> ReplicaView:
        """Choose among equals as every router does: by what the requests have in common, or by
        load."""
        digest, key = request.adapter_digest, request.session
        if digest:
            key = digest if len(members) == 1 else ""
        elif not key and request.prefix_keys:
            key = str(request.prefix_keys[0])
        if key:
            order = self._rendezvous.order(key)
            return min(views, key=lambda view: order.index(view.replica_id))
        least = min([view.fullness for view in views])
        equal = [view for view in views if view.fullness == least]
        number = rendezvous_number(request.request_id)
        return min(equal, key=lambda view: number ^ view.number)

    # ==== what is known ====

    def _known(self, replica_ids: Sequence[str]) -> list[ReplicaView]:
        try:
            return [self._views[replica_id] for replica_id in replica_ids]
        except KeyError:
            return [self._view(replica_id) for replica_id in replica_ids]

    def _view(self, replica_id: str) -> ReplicaView:
        return self._views.get(replica_id) or self._add(replica_id, self._unheard)

    def _add(self, replica_id: str, figures: ReplicaFigures) -> ReplicaView:
        view = self._views[replica_id] = ReplicaView(replica_id, figures, self._costs.priors)
        self._set_weights()
        return view

    def _set_weights(self) -> None:
        weights = [(view.replica_id, float(view.max_num_seqs)) for view in self._views.values()]
        self._rendezvous.set_replicas(weights)
