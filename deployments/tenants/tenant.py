"""Tenant: the party that a request belongs to, what it may use, and how much."""

from dataclasses import dataclass

from deployments.policy.admission import NO_LIMITS, Limits

PUBLIC = "public"  # the namespace open to all, and the one tenant where there are no keys


@dataclass(frozen=True, slots=True)
class Tenant:
    """`granted` are the namespaces beyond its own and `public`.

    `may_publish`: it may bring adapters into its own namespace, and retire them.
    """

    name: str
    limits: Limits = NO_LIMITS
    granted: tuple[str, ...] = ()
    may_publish: bool = False

    @property
    def default_namespaces(self) -> tuple[str, ...]:
        """Where a name without a tenant is looked for, in this order."""
        return (PUBLIC,) if self.name == PUBLIC else (self.name, PUBLIC)

    @property
    def namespaces(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.default_namespaces, *self.granted)))
