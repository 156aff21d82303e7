"""GrammarLink: one process of grammars as the engine sees it, from its start to its end.

The compiler's thread makes the calls that take long; the step loop has `masks` to itself.
"""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from engine.framing import Message
from engine.grammar.channel import Channel
from engine.grammar.limits import COMPILE_WALL_S, KEEP_TIMEOUT_S
from engine.grammar.mask_memory import MaskMemory
from engine.grammar.messages import (
    CheckGrammar,
    DropGrammar,
    FromControl,
    GrammarKept,
    KeepGrammar,
    MasksReady,
    StartGrammars,
    TableFailed,
    TableReady,
    Verdict,
)

PROGRAM = (sys.executable, "-m", "engine.grammar.process")
TABLE_TIMEOUT_S = 600.0  # a core that others use as well
CLOSE_TIMEOUT_S = 5.0


class NoTable(Exception):
    """The tokenizer cannot be used; to start another process would not help."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """What a process of grammars must know of a model."""

    tokenizer_path: str
    vocab_size: int
    eos_token_ids: tuple[int, ...]


class GrammarLink:
    """Starts the process at once. Its methods raise ChannelLost when it is gone."""

    def __init__(self, tokens: Tokens, memory: MaskMemory) -> None:
        pairs = [socket.socketpair() for _ in range(3)]
        theirs = [their.fileno() for _, their in pairs]
        control, checks, masks = (ours for ours, _ in pairs)
        self._control = Channel(control, msgspec.msgpack.Decoder(FromControl))
        self._checks = Channel(checks, msgspec.msgpack.Decoder(Verdict))
        self.masks = Channel(masks, msgspec.msgpack.Decoder(MasksReady))
        try:
            self._process = _popen(theirs, memory)
        finally:
            for _, their in pairs:
                their.close()
        self._send(StartGrammars(tokens.tokenizer_path, tokens.vocab_size, tokens.eos_token_ids))

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_for_table(self) -> None:
        """Raises NoTable if the tokenizer is not supported."""
        answer = self._control.receive(TABLE_TIMEOUT_S)
        if isinstance(answer, TableFailed):
            raise NoTable(answer.reason)
        assert isinstance(answer, TableReady)

    def compile(self, grammar_id: int, grammar: str) -> Verdict:
        """Check a grammar, and keep it if it is good."""
        self._checks.send(CheckGrammar(grammar))
        verdict = self._checks.receive(2 * COMPILE_WALL_S)
        if verdict.error is not None:
            return verdict
        self._send(KeepGrammar(grammar_id, grammar))
        kept = self._control.receive(KEEP_TIMEOUT_S)
        assert isinstance(kept, GrammarKept)
        return verdict if kept.error is None else Verdict(kept.error)

    def drop(self, grammar_id: int) -> None:
        self._send(DropGrammar(grammar_id))

    def interrupt(self) -> None:
        """End the process at once, and the call that another thread is in; that one kills."""
        self._process.kill()
        for channel in (self._control, self._checks, self.masks):
            channel.interrupt()

    def kill(self) -> None:
        """End the process at once, and what it has forked, whose sockets close with it."""
        self._process.kill()
        for channel in (self._control, self._checks, self.masks):
            channel.close()
        self._process.wait()

    def _send(self, message: Message) -> None:
        self._control.send(message)


def _popen(fds: Sequence[int], memory: MaskMemory) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [*PROGRAM, *map(str, (*fds, memory.fd, memory.num_slots, memory.num_rows))],
        pass_fds=[*fds, memory.fd],
        env={**os.environ, "RAYON_NUM_THREADS": "1"},
    )
