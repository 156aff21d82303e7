"""Ways in which an S3 server fails, for a Forwarder in front of a real one."""

import threading
import time
from collections.abc import Generator
from contextlib import contextmanager

from tests.adapter_store.forwarder import Fault, Forward, Forwarder, Reply, Request, no_fault

SLOW_S = 1.5


def slow(request: Request, forward: Forward) -> Reply | None:
    time.sleep(SLOW_S)
    return forward()


def refusing(status: int, code: str) -> Fault:
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>".encode()
    headers = {"content-type": "application/xml", "content-length": str(len(body))}

    def fault(request: Request, forward: Forward) -> Reply | None:
        return Reply(status, headers, body)

    return fault


def cutting(request: Request, forward: Forward) -> Reply | None:
    """Break off in the middle of each body; answers without one do not come at all."""
    reply = forward()
    if len(reply.body) < 2:
        return None
    return Reply(reply.status, reply.headers, reply.body, len(reply.body) // 2)


@contextmanager
def failing(forwarder: Forwarder, fault: Fault) -> Generator[None]:
    forwarder.fault = fault
    try:
        yield
    finally:
        forwarder.fault = no_fault


@contextmanager
def hanging(forwarder: Forwarder) -> Generator[None]:
    """Answer nothing; at the end the connections that wait are broken off."""
    is_over = threading.Event()

    def fault(request: Request, forward: Forward) -> Reply | None:
        is_over.wait()

    with failing(forwarder, fault):
        try:
            yield
        finally:
            is_over.set()
