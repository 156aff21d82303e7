"""Thought: the reasoning with which an answer may begin that must match a grammar otherwise."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from deployments.ingress.structured.lark import ANY_TEXT, SPACE, Lark
from deployments.text.channels import ENDS
from deployments.text.reasoning import ThinkTags


@dataclass(frozen=True, slots=True)
class Thought:
    """`mark_ids` are the marks of the model's formats that are tokens.

    With channels reasoning is a part of its own, and the answer behind it has a header.
    """

    tags: ThinkTags | None = None
    has_begun: bool = False  # the prompt has opened it: it must end before all else
    may_begin: bool = True
    has_channels: bool = False
    mark_ids: Mapping[str, int] = field(default_factory=dict[str, int])

    @property
    def is_possible(self) -> bool:
        return self.has_channels or (self.tags is not None and (self.has_begun or self.may_begin))

    def before(self, lark: Lark) -> str:
        """Write what may stand before the answer, white space behind it included."""
        if self.has_channels:
            thought = lark.until(ANY_TEXT, "<|end|>", *ENDS)
            analysis = f"{lark.marks('<|channel|>analysis<|message|>')} {thought}"
            return f"({analysis} {lark.marks('<|start|>assistant')})?"
        if self.tags is None or not self.is_possible:
            return ""
        closed = f"{lark.until(ANY_TEXT, self.tags.closing)} {SPACE}"
        if self.has_begun:
            return closed
        return f"({SPACE} {lark.marks(self.tags.opening)} {closed})?"

    def answer(self, lark: Lark, grammar: str) -> str:
        """Write an answer of a grammar, without what may stand before it."""
        if not self.has_channels:
            return grammar
        return f"{lark.marks('<|channel|>final<|message|>')} {grammar}"


NO_THOUGHT = Thought()
