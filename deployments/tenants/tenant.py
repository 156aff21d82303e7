"""Tenant: whose request it is, what it may use, and how much of it."""

from dataclasses import dataclass

from deployments.policy.admission import NO_LIMITS, Limits

PUBLIC = "public"  # everybody's namespace, and everybody where there are no keys


@dataclass(frozen=True, slots=True)
class Tenant:
    """`granted` are the namespaces beyond its own and `public`."""

    name: str
    limits: Limits = NO_LIMITS
    granted: tuple[str, ...] = ()

    @property
    def default_namespaces(self) -> tuple[str, ...]:
        """Where a name without a tenant is looked for, in this order."""
        return (PUBLIC,) if self.name == PUBLIC else (self.name, PUBLIC)

    @property
    def namespaces(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.default_namespaces, *self.granted)))
