"""What is kept of a conversion in the manifest of the adapter that came out of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class ConversionRecord:
    """Of what form an adapter was, and what part of each module's change the factors do not hold.

    A residual is ||change - factors|| / ||change||, both Frobenius norms; exact modules are left
    out.
    """

    source: str  # "MLX", "GGUF", "FINE_TUNE", or PEFT's peft_type
    residuals: Mapping[str, float] = field(default_factory=dict[str, float])

    @property
    def max_residual(self) -> float:
        """The largest residual of any module; 0 if all are exact."""
        return max(self.residuals.values(), default=0.0)


def parse_record(data: Any) -> ConversionRecord:
    """Decode a record from JSON. Raises AttributeError, KeyError, TypeError, ValueError."""
    residuals = {str(name): float(value) for name, value in data["residuals"].items()}
    return ConversionRecord(str(data["source"]), residuals)
