"""The compiler's thread where no process can be started."""

import threading
from typing import Any

import pytest

from engine.grammar.compiler import GrammarCompiler
from engine.grammar.limits import MAX_FAILED_STARTS


def test_without_a_process_grammars_are_refused_for_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.grammar.compiler.RESTART_BACKOFF_S", 0.05)
    started: list[None] = []
    woken = threading.Event()

    def start() -> Any:
        started.append(None)
        raise OSError("no process")

    compiler = GrammarCompiler(start, woken.set)
    compiler.submit("tenant", 1, "grammar")
    assert woken.wait(10) or compiler.has_news
    [(grammar_id, verdict, link)] = compiler.poll()
    assert (grammar_id, link, len(started)) == (1, None, MAX_FAILED_STARTS)
    assert verdict.error == "its process cannot be started" and not verdict.is_lasting
    compiler.submit("tenant", 2, "another")
    assert [done.grammar_id for done in compiler.poll()] == [2]
    compiler.close()
