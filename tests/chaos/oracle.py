"""Computes what a request must answer, with the engine alone: one request at a time, without HTTP,
without Ray, without anything in its caches."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import EngineConfig
from engine.engine import Engine
from engine.messages import AdapterFolder, GenerateRequest
from engine.scheduler.request import SamplingParams
from tests.chaos.stream import streamed
from tests.chaos.world import Content


@dataclass(frozen=True, slots=True)
class Prompt:
    """All of a request but its model."""

    token_ids: tuple[int, ...]
    num_tokens: int
    seed: int

    def body(self, model: str) -> dict[str, Any]:
        return streamed(model, list(self.token_ids), self.num_tokens, self.seed)


class Oracle:
    """Answers by content (None: the base model) and prompt. Close it before the server starts."""

    def __init__(self, base: Path, dtype: str) -> None:
        config = EngineConfig(
            str(base),
            dtype=dtype,
            device="cpu",
            memory_bytes=64 * 2**20,
            num_threads=1,
            enable_prefix_caching=False,
        )
        self._engine = Engine(config)
        self._num_requests = 0

    def answer(self, content: Content | None, prompt: Prompt) -> list[int]:
        self._num_requests += 1
        folder = None
        if content is not None:
            folder = AdapterFolder(content.folder.name, str(content.folder))
        sampling = SamplingParams(
            max_tokens=prompt.num_tokens,
            temperature=float(prompt.seed % 2),
            seed=prompt.seed,
            ignore_eos=True,
        )
        request = GenerateRequest(
            str(self._num_requests), list(prompt.token_ids), sampling, adapter_folder=folder
        )
        self._engine.add_request(request)
        return self._run()

    def close(self) -> None:
        self._engine.close()

    def _run(self) -> list[int]:
        token_ids: list[int] = []
        while True:
            for output in self._engine.step():
                if output.error is not None:
                    raise RuntimeError(output.error.message)
                token_ids += output.token_ids
                if output.finish_reason is not None:
                    return token_ids
            if self._engine.is_idle:
                time.sleep(0.0005)  # the adapter is being read
