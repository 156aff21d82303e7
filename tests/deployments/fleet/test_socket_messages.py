"""Messages of the direct socket: as they were after a round trip, and of a known version."""

import hashlib
import re
from dataclasses import is_dataclass
from enum import Enum
from typing import Any, get_args

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from deployments.fleet.socket_messages import (
    FROM_REPLICA,
    TICKET_BYTES,
    TO_REPLICA,
    VERSION,
    FromReplica,
    Submission,
    greeting,
    read_greeting,
)
from engine.framing import FrameDecoder, encode
from tests.engine.support.message_values import hints_of, values

# Digest of all messages and all they contain, by version.
KNOWN_SHAPES = {
    1: "89d5e6fb39f64fdb",
    2: "a53f52ad4c5ee1f2",
    3: "c96d66cf2230ccbc",
    4: "6cb2cf61c71aa420",
    5: "968af4ea4f9ad4a6",
    6: "59493099d36a64f6",
    7: "41304643d6fb09bf",
    8: "fd501eb8b071ab65",  # end tokens of adapters
    9: "6506a097920400ff",  # priorities
    10: "124711117764beab",  # adapters with more token ids than their base
    11: "30584fc6f4db71d8",  # sessions, drafted tokens
    12: "c059cfff9e133b49",  # when to retry
    13: "4935de021b53bb3d",  # weights of tenants
    14: "5411ce537ef5ea4e",  # classes, deadlines
    15: "d46da3c3de296c70",  # loads of adapters, ranks
}


@given(values(Submission))
def test_what_a_replica_is_sent_comes_back_as_it_was(message: Any) -> None:
    assert FrameDecoder(TO_REPLICA).feed(encode(message)) == [message]


@given(values(FromReplica))
def test_what_a_replica_sends_comes_back_as_it_was(message: Any) -> None:
    assert FrameDecoder(FROM_REPLICA).feed(encode(message)) == [message]


@given(st.binary(min_size=TICKET_BYTES, max_size=TICKET_BYTES))
def test_a_greeting_holds_ticket_and_version(ticket: bytes) -> None:
    assert read_greeting(greeting(ticket)) == (ticket, VERSION)


def shapes(hint: Any, found: dict[str, Any]) -> dict[str, Any]:
    """Fields of every message and dataclass that can be reached, by name."""
    for argument in get_args(hint):
        shapes(argument, found)
    if isinstance(hint, type) and issubclass(hint, Enum):
        found[hint.__name__] = sorted(str(m.value) for m in hint)
    elif is_dataclass(hint) or (isinstance(hint, type) and issubclass(hint, msgspec.Struct)):
        hints = hints_of(hint)
        found[hint.__name__] = [f"{name}: {_without_modules(each)}" for name, each in hints.items()]
        for each in hints.values():
            shapes(each, found)
    return found


def _without_modules(hint: Any) -> str:
    return re.sub(r"[a-z_.]+\.(?=[A-Z])", "", str(hint))


def test_a_change_of_the_messages_raises_the_version() -> None:
    found = shapes(Submission | FromReplica, {})
    text = "\n".join(f"{name} {found[name]}" for name in sorted(found))
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    assert KNOWN_SHAPES.get(VERSION) == digest, (
        "the messages have changed: raise socket_messages.VERSION and note its digest here, "
        f"{digest}; replicas of both versions may run together during an update\n{text}"
    )
