"""Metering: what an ingress knows of a request when it hands it to engines, as a usage record."""

from collections.abc import Callable
from dataclasses import dataclass

from deployments.ingress.model_resolver import COMBINED, Target
from deployments.tenants.tenant import Tenant
from deployments.usage.meter import NO_CHARGE, Charge, Meter, NoMeter
from deployments.usage.prices import NO_PRICES, Prices
from deployments.usage.record import UsageRecord
from engine.messages import GenerateRequest

# Begins to charge when the work begins, which is when an answer is called with a request's id.
OpenCharge = Callable[[str], Charge]


def free_of_charge(request_id: str) -> Charge:
    return NO_CHARGE


@dataclass(frozen=True, slots=True)
class Metering:
    """Where the usage of requests goes, and which price class they are of."""

    meter: Meter
    now: Callable[[], float]  # seconds since 1970
    prices: Prices = NO_PRICES

    def opener(
        self, tenant: Tenant, target: Target, route: str, request: GenerateRequest
    ) -> OpenCharge:
        """Return what begins the charge of a request that has been planned."""
        if isinstance(self.meter, NoMeter):
            return free_of_charge
        ref = target.adapter_ref
        rank = 0 if ref is None else ref.lora_rank
        is_combined = ref is not None and ref.recipe is not None

        def begin(request_id: str) -> Charge:
            record = UsageRecord(
                id="",
                request_id=request_id,
                time_s=round(self.now() - target.held_s, 6),
                tenant=tenant.name,
                key_id=tenant.key_id,
                route=route,
                model=target.model.id,
                lora_rank=rank,
                price_class=self.prices.class_of(target.model.id, rank),
                priority=request.priority,
                priority_class=request.priority_class.name.lower(),
            )
            if ref is not None:
                record.adapter = f"{ref.tenant}/{COMBINED if is_combined else ref.name}"
                record.version, record.digest = ref.version, ref.digest
            return self.meter.begin(record, target.held_s)

        return begin
