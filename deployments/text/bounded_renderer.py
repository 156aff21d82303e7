"""BoundedRenderer: render adapters' own chat templates in processes that are ended at a limit.

A process is started by the first chat that needs one and renders one chat at a time; one that ends
is replaced by the next chat's.
"""

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import IO, Any, cast

from adapter_store.chat_template import AdapterTemplate
from deployments.text.answer_syntax import ProbedTemplate
from deployments.text.chat_template import TemplateRefused
from deployments.text.tools.formats import FORMATS
from deployments.text.tools.probe import CallStyle, ToolSupport

PROGRAM = (sys.executable, "-m", "deployments.text.render_process")
NUM_PROCESSES = 2
WALL_S = 30.0  # for a process that neither computes nor answers
# A process that runs strangers' templates gets no credentials.
_PASSED_ON = ("LD_LIBRARY_PATH", "PATH", "TZ")


class BoundedRenderer:
    def __init__(self, num_processes: int = NUM_PROCESSES) -> None:
        self._threads = ThreadPoolExecutor(num_processes, "chat-template")
        self._idle: deque[_RenderProcess] = deque()

    async def render(
        self,
        template: AdapterTemplate,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        extra: Mapping[str, Any],
    ) -> str:
        """Render a chat. Raises TemplateRefused."""
        chat = {
            "source": template.source,
            "special_tokens": dict(template.special_tokens),
            "messages": list(messages),
            "add_generation_prompt": add_generation_prompt,
            "extra": dict(extra),
        }
        loop = asyncio.get_running_loop()
        answer = await loop.run_in_executor(self._threads, self._ask, chat)
        if "refused" in answer:
            raise TemplateRefused(answer["refused"])
        return answer["text"]

    async def probe(self, template: AdapterTemplate) -> ProbedTemplate:
        """Find how the template calls tools. One that cannot be used calls none."""
        question = {
            "source": template.source,
            "special_tokens": dict(template.special_tokens),
            "is_probe": True,
        }
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(self._threads, self._ask, question)
        if "refused" in found:
            return ProbedTemplate(template.source, ToolSupport(None, refusal=found["refused"]))
        tools = ToolSupport(
            None if found["form"] is None else FORMATS[found["form"]],
            CallStyle(**found["style"]),
            found["has_one_call"],
            found["refusal"],
        )
        return ProbedTemplate(template.source, tools, frozenset(found["variables"]))

    def close(self) -> None:
        """Wait for what is being rendered, and end the processes."""
        self._threads.shutdown(cancel_futures=True)
        while self._idle:
            self._idle.pop().end()

    def _ask(self, chat: Mapping[str, Any]) -> dict[str, Any]:
        process = self._idle.pop() if self._idle else _RenderProcess()
        answer = process.ask(json.dumps(chat).encode() + b"\n", WALL_S)
        if answer is None:
            process.end()
            return {"refused": "The chat template takes too much time or memory."}
        self._idle.append(process)
        return json.loads(answer)


class _RenderProcess:
    def __init__(self) -> None:
        environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        self._process = subprocess.Popen(
            PROGRAM,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**environment, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        self._stdin = cast("IO[bytes]", self._process.stdin)
        self._stdout = cast("IO[bytes]", self._process.stdout)

    def ask(self, line: bytes, wall_s: float) -> bytes | None:
        """Send a line and wait for the answer; None if the process ends instead."""
        watchdog = threading.Timer(wall_s, self._process.kill)
        watchdog.start()
        try:
            with suppress(BrokenPipeError):
                self._stdin.write(line)
                self._stdin.flush()
            answer = self._stdout.readline()
        finally:
            watchdog.cancel()
        return answer if answer.endswith(b"\n") else None

    def end(self) -> None:
        self._process.kill()
        with suppress(BrokenPipeError):
            self._stdin.close()
        self._stdout.close()
        self._process.wait()
