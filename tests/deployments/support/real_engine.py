"""A real engine on torch in the test's own event loop, and a store of real adapter folders."""

import asyncio
from pathlib import Path
from typing import Any

from adapter_store.names import AdapterRef
from engine.messages import GenerateRequest, RequestOutput
from tests.deployments.support.fakes import FakeEngine, FakeStore
from tests.engine.support.driver import make_engine


class RealEngine(FakeEngine):
    """Steps whenever the loop turns; in all else it is the fake, which counts the requests."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        super().__init__()
        self.engine = make_engine(folder, **changes)
        self.info = self.engine.info

    def submit(self, request: GenerateRequest) -> None:
        self.requests.append(request)
        self.engine.add_request(request)

    def abort(self, request_id: str, index: int | None = None) -> None:
        self.aborted.append(request_id)
        self.engine.abort(request_id, index)

    async def close(self) -> None:
        await super().close()
        self.engine.close()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(0 if self.engine.scheduler.has_unfinished else 0.001)
            outputs: list[RequestOutput] = self.engine.step()
            if outputs:
                self.on_frame(outputs)


class FolderStore(FakeStore):
    """Knows adapters by the names of their folders."""

    def __init__(self, **folders: Path) -> None:
        super().__init__(*folders)
        self.folders = folders

    def ensure_local(self, ref: AdapterRef, is_wanted: object = None) -> Path:
        return self.folders[ref.name]
