"""Tenant: the party that a request belongs to, what it may use, and how much."""

from dataclasses import dataclass, field

from deployments.policy.admission import NO_LIMITS, Limits
from engine.scheduler.classes import PriorityClass

PUBLIC = "public"  # the namespace open to all, and the one tenant where there are no keys


@dataclass(frozen=True, slots=True)
class UploadLimits:
    """How much may be published for one tenant. None is no limit."""

    max_upload_bytes: int
    max_lora_rank: int
    max_adapters: int | None
    max_stored_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Publisher:
    """Who holds a key for the admin API. Without a tenant it is for all of them."""

    name: str
    tenant: str | None

    @property
    def author(self) -> str:
        """What the store's log says of whose change it is."""
        return f"admin {self.name}" if self.tenant is None else f"{self.tenant}/{self.name}"

    def may_manage(self, tenant: str) -> bool:
        return self.tenant in (None, tenant)


@dataclass(frozen=True, slots=True)
class Tenant:
    """`granted` are the namespaces beyond its own and `public`.

    `may_publish`: it may bring adapters into its own namespace, and retire them.
    `weight`: its share of the engines beside other tenants that wait. No request may be of a higher
    class than `max_priority_class`; `max_ttft_s`: what holds for those that name no time.
    `key_id` names the key that was used, and says nothing of it.
    `shared`: namespaces beside `public` that are open to all.
    """

    name: str
    limits: Limits = NO_LIMITS
    granted: tuple[str, ...] = ()
    may_publish: bool = False
    weight: float = 1.0
    max_priority_class: PriorityClass = PriorityClass.STANDARD
    max_ttft_s: float | None = None
    key_id: str = field(default="", compare=False)
    shared: tuple[str, ...] = ()

    @property
    def default_namespaces(self) -> tuple[str, ...]:
        """Where a name without a tenant is looked for, in this order."""
        return tuple(dict.fromkeys((self.name, PUBLIC, *self.shared)))

    @property
    def namespaces(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.default_namespaces, *self.granted)))
