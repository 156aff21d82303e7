"""Prices: which price class a request is of, and what tokens and bytes of a class cost.

Exact decimals, never rounded before the end.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal, localcontext

DIGITS = 100  # more than any sum has: parts of a GiB have thirty behind the point
MILLION = Decimal(10**6)
GIB = Decimal(2**30)
UNPRICED = ""  # the class of requests that no entry fits


class NoSuchPrice(Exception):
    """Records are of a class that has no price."""


@dataclass(frozen=True, slots=True)
class Price:
    """Per million tokens, and per GiB of adapters that were loaded. None fits all."""

    name: str
    prompt: Decimal
    cached: Decimal
    output: Decimal
    load: Decimal
    models: frozenset[str] | None = None
    max_rank: int | None = None

    def fits(self, model: str, lora_rank: int) -> bool:
        is_model = self.models is None or model in self.models
        return is_model and (self.max_rank is None or lora_rank <= self.max_rank)

    def cost(
        self, prompt_tokens: int, cached_tokens: int, output_tokens: int, load_bytes: int
    ) -> Decimal:
        """Cached tokens are a part of the prompt's, and cost their own price alone."""
        with localcontext(prec=DIGITS):
            tokens = (
                self.prompt * (prompt_tokens - cached_tokens)
                + self.cached * cached_tokens
                + self.output * output_tokens
            )
            return tokens / MILLION + self.load * load_bytes / GIB


def add_costs(costs: Iterable[Decimal]) -> Decimal:
    """Add without rounding."""
    with localcontext(prec=DIGITS):
        return sum(costs, Decimal(0))


@dataclass(frozen=True, slots=True)
class Prices:
    """The first entry that fits a request is its class. `currency` is only written."""

    entries: Sequence[Price] = ()
    currency: str = ""

    def class_of(self, model: str, lora_rank: int) -> str:
        """Find the class; the base model has rank 0."""
        fitting = (each.name for each in self.entries if each.fits(model, lora_rank))
        return next(fitting, UNPRICED)

    def price(self, name: str) -> Price:
        """Find a class by its name. Raises NoSuchPrice."""
        for each in self.entries:
            if each.name == name:
                return each
        known = ", ".join(each.name for each in self.entries) or "none"
        what = f"price class {name!r}" if name else "no price class (no entry fitted then)"
        raise NoSuchPrice(f"there are records of {what}; usage.prices has {known}")


NO_PRICES = Prices()
