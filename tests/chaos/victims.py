"""Streams that run beside hostile requests, in a process of their own: nothing but the server and
the machine can slow down what they hear.

    python -m tests.chaos.victims < orders

The first line of standard input is the order, as JSON: `url`, `key` and `bodies`. The first answer
is what each body's stream says alone; from then on one client for each body repeats it until the
input ends, and the second answer says how that went.
"""

import asyncio
import json
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.chaos.stream import WHOLE, Heard, listen, new_session

ROOT = Path(__file__).parents[2]


@dataclass
class Outcome:
    """All repetitions together. `ends` counts how streams ended, `changed` those with other tokens
    than alone."""

    num_streams: int = 0
    num_tokens: int = 0
    changed: int = 0
    ends: dict[str, int] = field(default_factory=dict[str, int])
    longest_gap_s: float = 0.0
    longest_first_s: float = 0.0  # to the first token

    def take(self, heard: Heard, alone: list[int]) -> None:
        self.num_streams += 1
        self.num_tokens += len(heard.token_ids)
        self.ends[heard.end] = self.ends.get(heard.end, 0) + 1
        expected = alone if heard.end == WHOLE else alone[: len(heard.token_ids)]
        self.changed += heard.token_ids != expected
        self.longest_gap_s = max(self.longest_gap_s, heard.longest_gap_after_first_s)
        if heard.arrivals_s:
            self.longest_first_s = max(self.longest_first_s, heard.arrivals_s[0] - heard.sent_s)


class Victims:
    """The other end: starts the process, and asks it to stop."""

    def __init__(self, url: str, bodies: list[dict[str, Any]], key: str | None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.victims"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"url": url, "key": key, "bodies": bodies}) + "\n")
        self._process.stdin.flush()
        self.num_alone = json.loads(self._answer())

    def stop(self) -> Outcome:
        assert self._process.stdin is not None
        self._process.stdin.close()
        found = json.loads(self._answer())
        self._process.wait()
        return Outcome(**found)

    def kill(self) -> None:
        self._process.kill()
        with self._process:  # closes its pipes
            self._process.wait()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("the victims' process has ended")
        return answer


async def run() -> None:
    order = json.loads(sys.stdin.readline())
    key: str | None = order["key"]
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    async with new_session(order["url"]) as session:
        alone = [await _alone(session, body, headers) for body in order["bodies"]]
        print(json.dumps(list(map(len, alone))), flush=True)
        outcome, stop = Outcome(), asyncio.Event()
        asyncio.get_running_loop().add_reader(sys.stdin.fileno(), stop.set)

        async def repeat(body: dict[str, Any], expected: list[int]) -> None:
            while not stop.is_set():
                outcome.take(await listen(session, body, headers), expected)

        await asyncio.gather(*map(repeat, order["bodies"], alone))
    print(json.dumps(asdict(outcome)), flush=True)


async def _alone(session: Any, body: dict[str, Any], headers: dict[str, str]) -> list[int]:
    heard = await listen(session, body, headers)
    if heard.end != WHOLE:
        raise RuntimeError(f"{body['model']}: {heard.end} {heard.message}")
    return heard.token_ids


if __name__ == "__main__":
    asyncio.run(run())
