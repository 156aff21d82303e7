"""Rollouts: which version answers a request that names an alias.

An alias may have moved a moment ago: until its new versions are resident where the earlier ones
are (`flips.py`), the earlier ones go on to answer. Of versions that share an alias each answers its
part of the sessions, and what the requests of a trial show is counted (`trials.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from adapter_store.aliases import AliasView
from adapter_store.names import AdapterRef
from deployments.fleet.engine_link import EngineLink
from deployments.ingress.flips import Flips
from deployments.ingress.trials import Trials
from deployments.policy.canary import Answered
from deployments.policy.traffic_split import choose
from engine.messages import ErrorKind, RequestError

# What tells something of an adapter: others are the client's, or of a moment with too many.
FAULTS = (
    *(ErrorKind.ADAPTER_NOT_FOUND, ErrorKind.ADAPTER_INVALID, ErrorKind.ADAPTER_DAMAGED),
    *(ErrorKind.ADAPTER_UNAVAILABLE, ErrorKind.ENGINE_ERROR, ErrorKind.ENGINE_DIED),
)


class AliasNames(Protocol):
    """The part of `adapter_store.store.AdapterStore` that is used here."""

    def alias_view(self, tenant: str, full_name: str) -> AliasView | None: ...


@dataclass(frozen=True, slots=True)
class Arm:
    """The version of an alias that answers one request, and where that is counted."""

    view: AliasView
    ref: AdapterRef
    rollouts: "Rollouts"

    def answered(self, seen: Answered) -> None:
        """Count an answer that has come to its end."""
        self.rollouts.trials.add(self.view, self.ref.version, seen)

    def failed(self, error: RequestError) -> None:
        """Count an answer that ended with an error, and act on a version that is of no use."""
        if error.kind in FAULTS:
            self.rollouts.trials.add(self.view, self.ref.version, Answered(failed=True))
        if error.kind == ErrorKind.ADAPTER_INVALID:  # or it acts otherwise than its weights say
            self.rollouts.flips.fail(self.view, self.ref, error.message)

    def rated(self, quality: float) -> None:
        """Count feedback, from 0 (bad) to 1 (good)."""
        self.rollouts.trials.rate(self.view, self.ref.version, quality)


@dataclass(frozen=True, slots=True)
class Chosen:
    """Which version answers, where that is counted, and whether others answer by the same name."""

    ref: AdapterRef
    arm: Arm | None = None
    shares_name: bool = False


class Rollouts:
    """Used in one event loop; what waits for the store does so in threads."""

    def __init__(self, names: AliasNames, flips: Flips, trials: Trials) -> None:
        self._names = names
        self.flips, self.trials = flips, trials

    async def close(self) -> None:
        await self.flips.close()
        await self.trials.close()

    def choose(self, link: EngineLink, found: AdapterRef, full_name: str, session: str) -> Chosen:
        """Choose the version of a name for a session; without one the heaviest.

        `found` is what the store says of the name.
        """
        view = self._names.alias_view(found.tenant, full_name) if "@" in full_name else None
        shares = () if view is None else self.flips.shares(view, link)
        if view is None or not any(weight for _, weight in shares):
            return Chosen(found)
        ref = _choose(view, shares, session)
        return Chosen(ref, Arm(view, ref, self), len(shares) > 1)


def _choose(
    view: AliasView, shares: Sequence[tuple[AdapterRef, float]], session: str
) -> AdapterRef:
    if len(shares) == 1:
        return shares[0][0]
    if not session:
        return max(shares, key=lambda share: share[1])[0]
    return choose([(ref, f"{view.text} {ref.version}", weight) for ref, weight in shares], session)
