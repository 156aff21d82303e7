"""Chooses a replica for a request by what it costs there, within a bound on load.

    cost = queued tokens / the replica's own tokens per second
         + what one more request delays the others, and they it
         + the adapter's load time from the nearest tier that has it, the reload of the adapter that
           goes for it, and what a load costs the others
         + prompt tokens that are not in its prefix cache / its tokens per second

Each adapter has a set of replicas: the first ones of its rendezvous order, as many as its share of
the traffic needs. Where it must be loaded, a replica outside the set costs `home_s` more, so that
routers which do not talk load it at the same ones.

The bound, with figures that are true: a request is never sent to a replica that would then have
more requests than max((1 + epsilon) * mean, min_load) or no room, while another has room. The mean
is that of all replicas with this request, in proportion to their sizes; there always is one below
it (Mirrokni, Thorup and Zadimoghaddam 2018), also in whole requests, if epsilon * min_load is 1 or
more. Reported figures are up to a second old, so a
router adds what it has sent since, and a replica may be above by what other routers sent meanwhile.

Where a part of the traffic comes through other routers, each takes them to do as it does: what it
sends counts as many times as its own part goes into all, until the next report.

Only few replicas are looked at closely: the one with the least to do, and the least busy ones of
those that have the adapter, its files or the prompt's beginning. All that is known is kept in plain
Python, and the clock is an argument.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter

from deployments.policy.demand import Demand
from deployments.policy.holders import Holders
from deployments.policy.prefix_memory import PrefixMemory
from deployments.policy.rendezvous import Rendezvous, rendezvous_number
from deployments.policy.replica_view import Priors, ReplicaFigures, ReplicaView
from deployments.policy.traffic import Traffic

_START_S = attrgetter("start_s")


@dataclass(frozen=True, slots=True)
class RoutingCosts:
    """Constants of the prediction."""

    priors: Priors = field(default_factory=Priors)
    evicted: float = 1.0  # reloads of others for each load: what goes is wanted again
    load_s: float = 0.3  # added for each load: its work delays others, in the store, too
    home_s: float = 0.05  # added for a load outside the adapter's set
    sticky_s: float = 0.1  # taken off for the replica of the request's session
    epsilon: float = 0.35  # how far above the mean a replica's load may be
    min_load: int = 4  # requests; below this a replica's load is no reason to go elsewhere
    set_share: float = 0.5  # of a replica's part of all requests, for which an adapter gets one

    def set_size(self, share: float, num_replicas: int, num_requests: float) -> int:
        """Return how many replicas should have an adapter of this share of the requests."""
        if share * num_replicas < self.set_share:
            return 1
        part = self.set_share * max(num_requests / max(num_replicas, 1), 2 * self.min_load)
        return 1 + int(share * num_requests / part)


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


class _Candidates:
    """The replicas that a decision is about, and their sizes."""

    def __init__(self, replica_ids: Sequence[str], views: list[ReplicaView]) -> None:
        self.replica_ids, self.views = replica_ids, views
        self.sizes = {view.max_num_seqs for view in views}
        self.num_seats = sum([view.max_num_seqs for view in views])


class Router:
    """Chooses replicas for requests, and remembers where it has sent them. Not thread-safe.

    A replica that has not reported yet is taken to have the figures `unheard`. Routers of different
    names prefer different ones among equals.
    """

    def __init__(self, costs: RoutingCosts, unheard: ReplicaFigures, name: str = "") -> None:
        self._costs = costs
        self._unheard = unheard
        self._views: dict[str, ReplicaView] = {}
        self._candidates = _Candidates((), [])
        self._on_device, self._on_disk = Holders(), Holders()
        self._rendezvous = Rendezvous()
        self._prefixes = PrefixMemory()
        self._demand = Demand()
        self._number = rendezvous_number(name)
        self._total = 0.0  # requests at all replicas
        self._traffic = Traffic()

    def report(self, replica_id: str, figures: ReplicaFigures) -> None:
        """Take a report: it replaces what was added since the last one, except adapters.

        A report equal to the last one is ignored.
        """
        view = self._views.get(replica_id)
        if view is None:
            self._add(replica_id, figures)
        elif view.reported != figures:
            before = view.reported
            self._traffic.heard(figures.num_received - before.num_received, view.num_sent)
            view.report(figures)
            self._total = sum([each.num_requests for each in self._views.values()])
            self._on_device.set(view, view.device_adapters)
            if not _are_same(view.disk_adapters, before.disk_adapters):
                self._on_disk.set(view, view.disk_adapters)
            if before.max_num_seqs != figures.max_num_seqs:
                self._set_weights()

    def keep(self, replica_ids: Iterable[str]) -> None:
        """Forget every other replica."""
        wanted = dict.fromkeys(replica_ids)
        gone = [replica_id for replica_id in self._views if replica_id not in wanted]
        for replica_id in gone:
            view = self._views.pop(replica_id)
            self._total -= view.num_requests
            self._on_device.forget(view)
            self._on_disk.forget(view)
            self._prefixes.forget(replica_id)
        if gone:
            self._set_weights()

    def figures(self, replica_id: str) -> ReplicaFigures:
        """Return a replica's figures, with what was sent to it since."""
        return self._views[replica_id].figures() if replica_id in self._views else self._unheard

    def sent(self, replica_id: str, request: RoutedRequest, now: float) -> None:
        view, digest = self._view(replica_id), request.adapter_digest
        had = view.num_requests
        view.sent(request.num_prompt_tokens, digest, self._traffic.times)
        self._total += view.num_requests - had
        self._prefixes.sent(replica_id, request.prefix_keys)
        if digest:
            self._demand.add(digest, now)
            self._on_device.add(view, digest)

    def ended(self, replica_id: str, num_tokens: int) -> None:
        """Note that a request of this many tokens has ended, which was sent by this router."""
        view = self._views.get(replica_id)
        if view is not None:
            had = view.num_requests
            view.ended(num_tokens, self._traffic.times)
            self._total += view.num_requests - had

    def choose(self, replica_ids: Sequence[str], request: RoutedRequest) -> str:
        """Return the best replica: one to avoid only if there is no other."""
        among = self._known(replica_ids)
        if request.avoid:
            left = [v for v in among.views if v.replica_id not in request.avoid]
            among = _Candidates((), left) if left else among
        limits = self._limits(among)
        least = _least(among.views, limits)
        digest, keys = request.adapter_digest, request.prefix_keys
        if not (digest or keys or request.session):
            return least.replica_id
        members = self.replica_set(digest) if digest else []
        cached = self._prefixes.find(keys) if keys else {}
        home = self._home(request, members, among.views)
        are_all_full = least.num_requests >= limits[least.max_num_seqs]
        best, best_cost = least, self._cost(least, request, members, cached, home)
        for view in self._near(digest, members, cached, home, among):
            if are_all_full or view.num_requests < limits[view.max_num_seqs]:
                cost = self._cost(view, request, members, cached, home)
                if cost < best_cost:
                    best, best_cost = view, cost
        return best.replica_id

    def replica_set(self, adapter_digest: str) -> list[str]:
        """Return the replicas that should have an adapter, by its share of the requests."""
        order = self._rendezvous.order(adapter_digest)
        share = self._demand.share(adapter_digest)
        return order[: self._costs.set_size(share, len(order), self._total)]

    # ==== the choice ====

    def _limits(self, among: "_Candidates") -> dict[int, int]:
        """Return how many requests a replica may have before this one, by the size of its batch."""
        is_all = len(among.views) == len(self._views)
        total = 1 + (self._total if is_all else sum([v.num_requests for v in among.views]))
        per_seat, least = (1 + self._costs.epsilon) * total / among.num_seats, self._costs.min_load
        return {size: min(max(int(per_seat * size), least), size) for size in among.sizes}

    def _home(
        self, request: RoutedRequest, members: Sequence[str], views: Sequence[ReplicaView]
    ) -> ReplicaView | None:
        """Return the replica that all routers prefer for the session, or the prompt's beginning."""
        if request.session:
            order = members or self._rendezvous.order(request.session)[:1]
            return self._views.get(order[rendezvous_number(request.session) % len(order)])
        if request.prefix_keys and not request.adapter_digest:
            number = request.prefix_keys[0]
            return min(views, key=lambda view: view.number ^ number)
        return None

    def _near(
        self,
        digest: str,
        members: Sequence[str],
        cached: Iterable[str],
        home: ReplicaView | None,
        among: "_Candidates",
    ) -> list[ReplicaView]:
        """Return the candidates that may be better than the one with the least to do."""
        known = self._views
        near = [known[r] for r in members if r in known]
        near += [known[r] for r in cached if r in known]
        if home is not None:
            near.append(home)
        if digest:
            near += self._on_device.of(digest)
            on_disk = self._on_disk.of(digest)
            if on_disk:
                near.append(min(on_disk, key=_START_S))
        if len(among.views) < len(known):
            near = [view for view in near if view in among.views]
        return near

    def _cost(
        self,
        view: ReplicaView,
        request: RoutedRequest,
        members: Sequence[str],
        cached: dict[str, int],
        home: ReplicaView | None,
    ) -> float:
        costs, digest, replica_id = self._costs, request.adapter_digest, view.replica_id
        tokens = request.num_prompt_tokens
        if cached:
            tokens -= min(cached.get(replica_id, 0), tokens)
        cost = view.start_s + tokens * view.token_s
        if view is home:
            cost -= costs.sticky_s
        if digest and digest not in view.device_adapters:
            cost += costs.load_s + (1 + costs.evicted) * view.load_s(digest)
            if replica_id not in members:
                cost += costs.home_s
        return cost

    # ==== what is known ====

    def _known(self, replica_ids: Sequence[str]) -> "_Candidates":
        """Return the views, in an order of this router's own."""
        if replica_ids == self._candidates.replica_ids:
            return self._candidates
        views = [self._view(replica_id) for replica_id in replica_ids]
        views.sort(key=lambda view: view.number ^ self._number)
        self._candidates = _Candidates(list(replica_ids), views)
        return self._candidates

    def _view(self, replica_id: str) -> ReplicaView:
        return self._views.get(replica_id) or self._add(replica_id, self._unheard)

    def _add(self, replica_id: str, figures: ReplicaFigures) -> ReplicaView:
        view = self._views[replica_id] = ReplicaView(replica_id, figures, self._costs.priors)
        self._total += view.num_requests
        self._on_device.set(view, view.device_adapters)
        self._on_disk.set(view, view.disk_adapters)
        self._set_weights()
        return view

    def _set_weights(self) -> None:
        weights = [(view.replica_id, float(view.max_num_seqs)) for view in self._views.values()]
        self._rendezvous.set_replicas(weights)
        self._candidates = _Candidates((), [])


def _are_same(a: frozenset[str], b: frozenset[str]) -> bool:
    """Compare what may be thousands of adapters, and mostly is what it was."""
    return a is b or a == b


def _least(views: list[ReplicaView], limits: dict[int, int]) -> ReplicaView:
    """Return the replica with the least to do, within the bound if any is."""
    least = min(views, key=_START_S)
    if least.num_requests < limits[least.max_num_seqs]:
        return least
    with_room = [v for v in views if v.fullness < 1.0 and not v.is_kv_full]
    within = [v for v in with_room if v.num_requests < limits[v.max_num_seqs]]
    return min(within or with_room or views, key=_START_S)
