"""Verdicts reach the store in order, and a store that cannot take them stops nothing."""

import logging

import pytest

from adapter_store.errors import AccessDenied, SourceUnavailable
from adapter_store.verdict import Verdict
from deployments.replica.verdict_writer import VerdictWriter
from engine.messages import AdapterVerdict

FOUND = AdapterVerdict("d", "failed", "p", 1.0, 0.9, 0.2, "does not act")


class Store:
    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.noted: list[tuple[str, Verdict]] = []
        self.num_calls = 0

    def note_verdict(self, digest: str, verdict: Verdict) -> bool:
        self.num_calls += 1
        if self.errors:
            raise self.errors.pop(0)
        self.noted.append((digest, verdict))
        return True


def note(store: Store, times: int) -> None:
    writer = VerdictWriter(store)
    for _ in range(times):
        writer.note(FOUND, "bfloat16, torch")
        writer._threads.submit(lambda: None).result()
    writer.close()


def test_a_verdict_is_stored_with_what_computed_it() -> None:
    note(store := Store(), 1)
    verdict = Verdict("failed", "p", "bfloat16, torch", 1.0, 0.9, 0.2, "does not act")
    assert store.noted == [("d", verdict)]


def test_a_store_that_is_down_costs_one_verdict(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        note(store := Store(SourceUnavailable("down")), 2)
    assert len(store.noted) == 1 and "the verdict on d is not stored: down" in caplog.text


def test_one_that_may_only_be_read_is_asked_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        note(store := Store(AccessDenied("no right to write")), 3)
    assert store.num_calls == 1 and "no right to write" in caplog.text
