"""EngineHandle: what a replica needs of its engine's process."""

from collections.abc import Sequence
from typing import Protocol

from engine.messages import EngineInfo, EngineStats, FlowTokens, GenerateRequest


class EngineHandle(Protocol):
    """The part of `engine.client.EngineClient` that a replica uses."""

    stats: EngineStats
    failure: str | None  # why the process is not started again any more

    @property
    def info(self) -> EngineInfo: ...
    @property
    def outage(self) -> str | None: ...  # why requests are refused now, in words for clients
    @property
    def trouble(self) -> str | None: ...  # the same with its reason, for /health
    async def start(self) -> EngineInfo: ...
    def submit(self, request: GenerateRequest) -> None: ...
    def abort(self, request_id: str, index: int | None = None) -> None: ...
    def count_elsewhere(self, served: Sequence[FlowTokens]) -> None: ...
    async def close(self) -> None: ...
