"""Checks grammars, each in a process of its own that may be slow, grow or crash.

    serve_checks(channel, table, ...)    in a process that has a table and one thread

A grammar comes from a client. It is compiled, and a random output of it is begun, before anything
that others need touches it. The trial has limits of time and memory that the kernel keeps.
"""

import json
import os
import random
import resource
import select
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from llguidance import LLTokenizer

from engine.grammar.channel import Channel, ChannelLost
from engine.grammar.limits import (
    COMPILE_BYTES,
    COMPILE_CPU_S,
    COMPILE_WALL_S,
    MASK_CPU_S,
    MIB,
    TRIED_TOKENS,
)
from engine.grammar.matchers import advance, new_matcher, next_mask
from engine.grammar.messages import CheckGrammar, Verdict
from engine.grammar.place import find_place, schemas_of

NICENESS = 10  # steps that are being computed go first
MAX_ERROR = 2000  # characters; a line is written at once

_TOO_COMPLEX = (
    f"the grammar is too complex: compiling it takes more than {COMPILE_CPU_S} s or "
    f"{COMPILE_BYTES // MIB} MiB"
)


def serve_checks(
    channel: Channel[CheckGrammar], table: LLTokenizer, eos_token_ids: Sequence[int]
) -> None:
    """Answer one CheckGrammar after the other, until the other end closes."""
    os.nice(NICENESS)
    with suppress(ChannelLost):
        while True:
            grammar = channel.receive().grammar
            channel.send(_check(table, grammar, eos_token_ids))


def _check(table: LLTokenizer, grammar: str, eos_token_ids: Sequence[int]) -> Verdict:
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        _try_and_exit(write_fd, table, grammar, eos_token_ids)
    os.close(write_fd)
    report = _read_all(read_fd, COMPILE_WALL_S)
    os.close(read_fd)
    if report is None:
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    if report is None:
        return Verdict("compiling the grammar takes too long, try again later", is_lasting=False)
    if not report:
        return Verdict(_TOO_COMPLEX)
    return Verdict(**json.loads(report.splitlines()[-1]))


def _read_all(fd: int, timeout_s: float) -> bytes | None:
    """Read until the other end closes; None if it does not in time."""
    deadline_s = time.monotonic() + timeout_s
    data = b""
    while True:
        readable, _, _ = select.select([fd], [], [], max(deadline_s - time.monotonic(), 0.0))
        if not readable:
            return None
        chunk = os.read(fd, 1 << 16)
        if not chunk:
            return data
        data += chunk


# ==== the process of one trial ====


def _try_and_exit(
    write_fd: int, table: LLTokenizer, grammar: str, eos_token_ids: Sequence[int]
) -> None:
    """Report a Verdict's fields, a line of JSON; nothing if a limit ends the process before."""
    try:
        _limit()
        before = _peak_bytes()
        error = _try(table, grammar, eos_token_ids)
        error = error and error[:MAX_ERROR]
        _report(write_fd, error, _peak_bytes() - before)
        if error is not None:
            _report(write_fd, error + _place(table, grammar), 0)
    finally:
        os._exit(0)


def _report(write_fd: int, error: str | None, num_bytes: int) -> None:
    line = json.dumps({"error": error, "num_bytes": num_bytes})
    os.write(write_fd, line.encode() + b"\n")


def _place(table: LLTokenizer, grammar: str) -> str:
    """Say which part of a schema is refused. May be ended by a limit, after the first report."""

    def error_of(part: dict[str, Any]) -> str | None:
        try:
            new_matcher(table, json.dumps({"grammars": [{"json_schema": part}]}))
        except ValueError as error:
            return str(error)
        return None

    for path, schema in schemas_of(grammar):
        if error_of(schema) is not None:
            return f", at {path + find_place(schema, error_of) or 'the top'}"
    return ""


def _limit() -> None:
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (COMPILE_CPU_S, COMPILE_CPU_S + 1))
    resource.setrlimit(resource.RLIMIT_AS, (size + COMPILE_BYTES, size + COMPILE_BYTES))


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _try(table: LLTokenizer, grammar: str, eos_token_ids: Sequence[int]) -> str | None:
    """Begin a random output. Returns why the grammar cannot be used."""
    dice = random.Random(0)
    times_s: list[float] = []
    try:
        matcher = new_matcher(table, grammar)
        for _ in range(TRIED_TOKENS):
            before_s = time.thread_time()
            mask = next_mask(matcher, eos_token_ids)
            times_s.append(time.thread_time() - before_s)
            token_id = _draw(mask, dice)
            if matcher.is_stopped() or token_id is None:
                break
            advance(matcher, (token_id,), eos_token_ids)
    except ValueError as error:
        return str(error)
    slowest_s = sorted(times_s)[-2] if len(times_s) > 1 else 0.0
    if slowest_s <= MASK_CPU_S:
        return None
    return (
        f"the grammar is too complex: {1e3 * slowest_s:.0f} ms of computing for a token, and at "
        f"most {1e3 * MASK_CPU_S:.0f} ms are allowed"
    )


def _draw(mask: bytearray, dice: random.Random) -> int | None:
    """Choose an allowed token, evenly enough; None if there is none."""
    start = dice.randrange(len(mask))
    turned = mask[start:] + mask[:start]
    zeros = len(turned) - len(turned.lstrip(b"\0"))
    if zeros == len(turned):
        return None
    byte = (start + zeros) % len(mask)
    bits = [bit for bit in range(8) if mask[byte] >> bit & 1]
    return byte * 8 + dice.choice(bits)
