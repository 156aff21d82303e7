"""Numbers of a simulation's file, with the range that each may have."""

from typing import Annotated

from msgspec import Meta


class InvalidSimulation(ValueError):
    """The file says something that cannot be simulated; the message names where and what."""


Seconds = Annotated[float, Meta(ge=0.0, le=1e9)]
PerSecond = Annotated[float, Meta(gt=0.0, le=1e6)]
Share = Annotated[float, Meta(ge=0.0, le=1.0)]
Positive = Annotated[float, Meta(gt=0.0, le=1e6)]
Sigma = Annotated[float, Meta(ge=0.0, le=5.0)]
Count = Annotated[int, Meta(ge=1, le=10_000_000)]
Bytes = Annotated[int, Meta(ge=1, le=2**50)]
