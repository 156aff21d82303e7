"""Define a tool call, and what a tool's name may be."""

import re
from dataclasses import dataclass

NAME = r"[a-zA-Z0-9_-]{1,64}"  # as in OpenAI's interface

_NAME = re.compile(NAME)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that a model has written. `arguments` is the text of a JSON object."""

    name: str
    arguments: str


class NotACall(Exception):
    """The text is not a call in the format that is read; it is an answer's text."""


def is_name(text: object) -> bool:
    return isinstance(text, str) and _NAME.fullmatch(text) is not None
