"""Write grammars in llguidance's dialect of Lark: rules, terminals, and marks as tokens."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence

ANY_TEXT = "/(?s:.*)/"
SPACE = "SPACE"  # between the parts of a call, where its reader takes white space of any kind
_SPACE_RULE = r"SPACE: /[ \n]{0,8}/"


class Lark:
    """The rules of one grammar. Those with the same body are one rule."""

    def __init__(self, mark_ids: Mapping[str, int]) -> None:
        """`mark_ids` are texts that are tokens: outputs must have those, not their letters."""
        self._mark_ids = mark_ids
        tokens = sorted(mark_ids, key=len, reverse=True)
        self._tokens = re.compile("|".join(map(re.escape, tokens))) if tokens else None
        self._names: dict[tuple[str, str], str] = {}  # by kind and body
        self._lines: list[str] = [_SPACE_RULE]

    def text(self, start: str) -> str:
        return "\n".join((f"start: {start}", *self._lines))

    def rule(self, body: str) -> str:
        return self._named("r", body)

    def terminal(self, body: str) -> str:
        """Name a regular expression of Lark's own operators."""
        return self._named("T", body)

    def reserve(self) -> str:
        """Name a rule that is yet to be defined, since it refers to itself."""
        name = f"r_{len(self._names)}"
        self._names["reserved", name] = name
        return name

    def define(self, name: str, body: str) -> None:
        self._lines.append(f"{name}: {body}")

    def _named(self, kind: str, body: str) -> str:
        if (kind, body) not in self._names:
            self._names[kind, body] = name = f"{kind}_{len(self._names)}"
            self._lines.append(f"{name}: {body}")
        return self._names[kind, body]

    def marks(self, text: str) -> str:
        """Write a text, in which marks are the tokens that they are."""
        return " ".join(quoted(p) if isinstance(p, str) else f"<[{p}]>" for p in self._cut(text))

    def until(self, allowed: str, end: str, *others: str, before: str = "", after: str = "") -> str:
        """Write a text of an expression, and the end, which it does not contain; nor the others.

        `before` and `after` stand next to the text.
        """
        pieces = list(self._cut(end))
        plain = pieces.pop(0) if isinstance(pieces[0], str) else ""
        parts = [quoted(before), f"({without(allowed, end, *others)})", quoted(after + str(plain))]
        lexeme = self.terminal(" ".join(part for part in parts if part != '""'))
        rest = (quoted(p) if isinstance(p, str) else f"<[{p}]>" for p in pieces)
        return " ".join((lexeme, *rest))

    def _cut(self, text: str) -> Iterator[str | int]:
        at = 0
        for found in () if self._tokens is None else self._tokens.finditer(text):
            if found.start() > at:
                yield text[at : found.start()]
            yield self._mark_ids[found[0]]
            at = found.end()
        if at < len(text):
            yield text[at:]


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def any_of(expressions: Sequence[str]) -> str:
    return expressions[0] if len(expressions) == 1 else f"({' | '.join(expressions)})"


def regex(pattern: str) -> str:
    """Write a regular expression between slashes: escape a slash, and the line's end."""
    parts: list[str] = []
    is_escaped = False
    for character in pattern:
        if character == "/" and not is_escaped:
            parts.append("\\")
        is_escaped = character == "\\" and not is_escaped
        parts.append("\\n" if character == "\n" else character)
    return f"/{''.join(parts)}/"


def without(allowed: str, *texts: str) -> str:
    """Write an expression whose texts do not contain others."""
    return f"{allowed} & ~({ANY_TEXT} {any_of([quoted(text) for text in texts])} {ANY_TEXT})"
