"""Urgency: a request's priority class, and how long its first token may take.

Both come in headers, the class of OpenAI's requests in the body as well; a tenant has a highest
class and may have a time of its own.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from deployments.fleet.protocol import Submit
from deployments.ingress.http_errors import forbidden, invalid, too_late
from deployments.tenants.tenant import Tenant
from engine.scheduler.classes import PriorityClass

CLASS_HEADER, TIMEOUT_HEADER = "x-priority-class", "x-request-timeout"
CLASSES = {each.name.lower(): each for each in PriorityClass}
LEAST_TIMEOUT_S, MOST_TIMEOUT_S = 0.001, 86_400.0
MAX_CHARS = 40  # of a value that an error repeats


@dataclass(frozen=True, slots=True)
class Urgency:
    """How urgent a tenant's request is. `timeout_s` is from `since_s` on the clock."""

    highest: PriorityClass = PriorityClass.INTERACTIVE
    priority_class: PriorityClass = PriorityClass.STANDARD
    timeout_s: float | None = None
    since_s: float = 0.0
    clock: Callable[[], float] = time.monotonic

    def in_class(self, name: str | None) -> "Urgency":
        """Return the urgency that a request's body asks for. Raises ApiError."""
        if name is None:
            return self
        return replace(self, priority_class=_permitted(name, "priority_class", self.highest))

    def left_s(self) -> float | None:
        """Return the seconds that are left. Raises ApiError (503) if there are none."""
        if self.timeout_s is None:
            return None
        left_s = self.since_s + self.timeout_s - self.clock()
        if left_s <= 0:
            raise too_late(f"No token came in the {self.timeout_s:g} s that the request allows.")
        return left_s


NORMAL = Urgency()


def urgency_of(
    headers: Mapping[str, str], tenant: Tenant, clock: Callable[[], float] = time.monotonic
) -> Urgency:
    """Read a request's headers, within its tenant's rights. Raises ApiError (400, 403)."""
    highest, name = tenant.max_priority_class, headers.get(CLASS_HEADER)
    wanted = max(PriorityClass.STANDARD, highest)
    if name is not None:
        wanted = _permitted(name, CLASS_HEADER, highest)
    text = headers.get(TIMEOUT_HEADER)
    timeout_s = tenant.max_ttft_s if text is None else _seconds(text)
    return Urgency(highest, wanted, timeout_s, clock(), clock)


def urgent(submits: Sequence[Submit], urgency: Urgency) -> Sequence[Submit]:
    """Return the submits with their class, and the time that is left. Raises ApiError (503)."""
    left_s, wanted = urgency.left_s(), urgency.priority_class
    if left_s is None and wanted is PriorityClass.STANDARD:
        return submits
    return [
        replace(each, request=replace(each.request, priority_class=wanted), timeout_s=left_s)
        for each in submits
    ]


def _permitted(name: str, where: str, highest: PriorityClass) -> PriorityClass:
    found = CLASSES.get(name)
    if found is None:
        names = ", ".join(CLASSES)
        raise invalid(f"{where} must be one of {names}, not {name[:MAX_CHARS]!r}.", where)
    if found < highest:
        raise forbidden(f"{where}: {name} is above the tenant's highest, {highest.name.lower()}.")
    return found


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not LEAST_TIMEOUT_S <= seconds <= MOST_TIMEOUT_S:
        raise invalid(
            f"{TIMEOUT_HEADER} must be seconds in [{LEAST_TIMEOUT_S:g}, {MOST_TIMEOUT_S:g}], not "
            f"{text[:MAX_CHARS]!r}.",
            TIMEOUT_HEADER,
        )
    return seconds
