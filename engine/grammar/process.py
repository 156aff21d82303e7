"""Compute token masks in a process of its own, so that no grammar can hold up or end an engine.

    python -m engine.grammar.process <fds of control, checks, masks, memory> <slots> <rows of each>

The process builds the tokenizer's table, which takes seconds of a whole core. Then it forks: the
child checks grammars, while it has a single thread; the parent compiles the good ones in a second
thread, and computes masks in the first.
"""

import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress

import msgspec

from engine.grammar.channel import Channel, ChannelLost
from engine.grammar.checker import serve_checks
from engine.grammar.limits import FORCED_CPU_S
from engine.grammar.mask_memory import MaskMemory
from engine.grammar.matchers import Matchers, build_table
from engine.grammar.messages import (
    CheckGrammar,
    DropGrammar,
    GrammarKept,
    KeepGrammar,
    MasksReady,
    StartGrammars,
    TableFailed,
    TableReady,
    ToControl,
    WantMasks,
)

Control = Channel[ToControl]


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C the engine closes the connection
    control_fd, checks_fd, masks_fd, memory_fd, num_slots, num_rows = map(int, sys.argv[1:])
    control: Control = Channel(socket.socket(fileno=control_fd), msgspec.msgpack.Decoder(ToControl))
    checks = Channel(socket.socket(fileno=checks_fd), msgspec.msgpack.Decoder(CheckGrammar))
    masks = Channel(socket.socket(fileno=masks_fd), msgspec.msgpack.Decoder(WantMasks))
    with suppress(ChannelLost):
        start = control.receive()
        assert isinstance(start, StartGrammars)
        eos_token_ids = start.eos_token_ids
        try:
            table = build_table(start.tokenizer_path, start.vocab_size, eos_token_ids[0])
        except ValueError as error:
            control.send(TableFailed(str(error)))
            return
        if os.fork() == 0:
            control.leave()
            masks.leave()
            serve_checks(checks, table, eos_token_ids)
            return
        checks.leave()
        memory = MaskMemory(memory_fd, num_slots, start.vocab_size, num_rows)
        matchers = Matchers(table, eos_token_ids, memory)
        control.send(TableReady())
        threading.Thread(target=serve_control, args=(control, matchers), daemon=True).start()
        serve_masks(masks, matchers)


def serve_control(control: Control, matchers: Matchers) -> None:
    with suppress(ChannelLost):
        while True:
            message = control.receive()
            if isinstance(message, KeepGrammar):
                control.send(_keep(matchers, message))
            elif isinstance(message, DropGrammar):
                matchers.drop(message.grammar_id)


def _keep(matchers: Matchers, message: KeepGrammar) -> GrammarKept:
    try:
        matchers.keep(message.grammar_id, message.grammar)
    except ValueError as error:
        return GrammarKept(str(error))
    return GrammarKept()


def serve_masks(masks: Channel[WantMasks], matchers: Matchers) -> None:
    """Compute masks until the engine closes. Raises ChannelLost."""
    while True:
        wanted = masks.receive()
        for slot in wanted.ended_slots:
            matchers.end(slot)
        errors: dict[int, str] = {}
        num_masks: dict[int, int] = {}
        for slot, grammar_id, token_ids, drafts, _ in wanted.steps:
            try:
                count = matchers.step(slot, grammar_id, token_ids, drafts)
            except ValueError as error:
                errors[slot] = str(error)
            else:
                if drafts:
                    num_masks[slot] = count
        masks.send(MasksReady(wanted.number, errors, num_masks, _forced(wanted, errors, matchers)))


def _forced(wanted: WantMasks, errors: dict[int, str], matchers: Matchers) -> dict[int, list[int]]:
    """Find the tokens that are certain, of slots where there are more than the step samples."""
    end_s = time.thread_time() + FORCED_CPU_S
    found = {
        slot: matchers.go_ahead(slot, max_forced, end_s)
        for slot, _, _, _, max_forced in wanted.steps
        if max_forced and slot not in errors
    }
    return {slot: token_ids for slot, token_ids in found.items() if len(token_ids) > 1}


if __name__ == "__main__":
    main()
