"""Verdict: what an engine has found out about an adapter, as the log keeps it.

It is no part of an adapter's content: the digest says what was published, a verdict what was seen
of it since.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

Outcome = Literal["proven", "no_effect", "failed"]
MAX_REASON = 1000  # characters


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of one adapter's latest probe; differences are those of logprobs."""

    outcome: Outcome
    probe: str  # SHA-256 of the probe's tokens and of the logprobs that were served
    engine: str  # what computed it: the base's format and the kernels
    effect: float  # between the base and the adapter, as its weights say
    error: float  # between that and what was served
    margin: float  # the largest error that passes
    reason: str = ""  # why it failed, or has no effect
    proven_s: float = 0.0  # seconds since 1970; set when it is stored

    def __post_init__(self) -> None:
        if self.outcome not in get_args(Outcome):
            raise ValueError(f"outcome {self.outcome!r} is not one of {get_args(Outcome)}")

    def says_the_same_as(self, other: "Verdict | None") -> bool:
        """Check whether a later verdict brings nothing new: another engine's is no news."""
        return other is not None and self.outcome == other.outcome

    def to_data(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)

    @staticmethod
    def from_data(data: Mapping[str, Any]) -> "Verdict":
        """Undo `to_data`; KeyError, TypeError or ValueError for other data."""
        return Verdict(
            outcome=data["outcome"],
            probe=str(data["probe"]),
            engine=str(data["engine"]),
            effect=float(data["effect"]),
            error=float(data["error"]),
            margin=float(data["margin"]),
            reason=str(data["reason"])[:MAX_REASON],
            proven_s=float(data["proven_s"]),
        )
