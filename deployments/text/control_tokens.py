"""ControlTokens: keep the control tokens that a template writes apart from those in users' text.

Text that spells a control token, such as `<|im_end|>`, would be encoded as that token and could end
a turn or begin one in another role. A mark behind its first character survives the template; the
rendered text is cut there, and no piece spells the token any more.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any, cast

CUT = "\ufdd0"  # a character that Unicode gives to no text
END = "\ufdd1"  # another one: where the message to be continued ends


class ControlTokens:
    def __init__(self, tokens: Iterable[str]) -> None:
        tails: dict[str, list[str]] = {}
        for token in tokens:
            if len(token) > 1:
                tails.setdefault(token[0], []).append(token[1:])
        starts = (f"{re.escape(first)}(?={_any_of(rest)})" for first, rest in tails.items())
        self._starts = re.compile("|".join(starts)) if tails else None

    def mark(self, value: Any) -> Any:
        """Mark control tokens in a text, or in all texts and names inside lists and objects."""
        return _in_texts(self._mark_text, value)

    def _mark_text(self, text: str) -> str:
        if self._starts is None:
            return text
        return self._starts.sub(lambda found: found[0] + CUT, text)


def without_marks(value: Any) -> Any:
    """Replace the two marks in all texts and names of a client, at any depth."""
    return _in_texts(lambda text: text.replace(CUT, "\ufffd").replace(END, "\ufffd"), value)


def _in_texts(change: Callable[[str], str], value: Any) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_in_texts(change, item) for item in cast("list[Any]", value)]
    if isinstance(value, dict):
        items = cast("dict[str, Any]", value).items()
        return {change(name): _in_texts(change, item) for name, item in items}
    return value


def _any_of(texts: Iterable[str]) -> str:
    """Write a pattern that tries each first character once, however many texts share it."""
    tails: dict[str, list[str]] = {}
    for text in texts:
        if not text:
            return ""  # one of the texts ends here: whatever follows, it is found
        tails.setdefault(text[0], []).append(text[1:])
    branches = [re.escape(first) + _any_of(rest) for first, rest in tails.items()]
    return branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"
