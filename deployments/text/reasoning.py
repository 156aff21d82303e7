"""Part a model's reasoning from its answer, by the tags around it.

The tags are found in the chat template: a model that writes none of these pairs is not parted.
"""

from collections.abc import Collection
from dataclasses import dataclass

from deployments.text.tools.scanner import Scanner


@dataclass(frozen=True, slots=True)
class ThinkTags:
    name: str
    opening: str
    closing: str


_ALL = (
    ThinkTags("think", "<think>", "</think>"),
    ThinkTags("think-opensource", "<think:opensource>", "</think:opensource>"),
    ThinkTags("mm-think", "<mm:think>", "</mm:think>"),
    ThinkTags("seed-think", "<seed:think>", "</seed:think>"),
    ThinkTags("mistral", "[THINK]", "[/THINK]"),
    ThinkTags("cohere", "<|START_THINKING|>", "<|END_THINKING|>"),
    ThinkTags("gemma-4", "<|channel>thought\n", "<channel|>"),
    ThinkTags("apertus", "<|inner_prefix|>", "<|inner_suffix|>"),
)

THINK_TAGS = {tags.name: tags for tags in _ALL}


def find_think_tags(template: str, special_tokens: Collection[str]) -> ThinkTags | None:
    """Choose the tags that a template closes: with them it removes old reasoning or shows it.

    Without those, the tags that the vocabulary has as tokens.
    """
    for tags in _ALL:
        if tags.closing.strip() in template:
            return tags
    for tags in _ALL:
        if tags.opening.strip() in special_tokens and tags.closing in special_tokens:
            return tags
    return None


def is_reasoning(tags: ThinkTags, prompt: str, continued: str | None = None) -> bool:
    """Tell whether an answer to this prompt begins inside the tags.

    `continued` is the message with which the prompt ends, if the answer goes on with it.
    """
    if continued is not None and tags.opening.rstrip() in continued:
        return continued.rfind(tags.opening.rstrip()) > continued.rfind(tags.closing)
    opening = prompt.rfind(tags.opening.rstrip())
    return opening >= 0 and prompt[opening:].rstrip() == tags.opening.rstrip()


class ReasoningSplitter:
    """White space next to the tags is dropped, as templates write their own."""

    __slots__ = ("_has_begun", "_is_inside", "_may_open", "_scanner", "_space", "_tags", "is_over")

    def __init__(self, tags: ThinkTags, is_inside: bool) -> None:
        self._tags = tags
        self._is_inside = is_inside
        self._may_open = not is_inside
        self._scanner = Scanner()
        self._has_begun = False
        self._space = ""  # held back: the closing tag may follow it
        self.is_over = False  # all that follows is the answer

    def push(self, text: str) -> tuple[str, str]:
        """Return what is new of the reasoning, and of the answer."""
        if self.is_over:
            return "", text
        self._scanner.add(text)
        if self._may_open:
            self._open()
        reasoning = self._thought() if self._is_inside else ""
        answer = "" if self._may_open or self._is_inside else self._answer()
        self._scanner.take_read()
        return reasoning, answer

    def flush(self) -> tuple[str, str]:
        """Return the rest. Nothing may be pushed after it."""
        self._scanner.is_whole = True
        return self.push("")

    def _open(self) -> None:
        """Read the opening tag, unless the answer begins with something else."""
        scanner, opening = self._scanner, self._tags.opening
        rest = scanner.rest.lstrip()
        if rest.startswith(opening):
            scanner.take(len(scanner.rest) - len(rest) + len(opening))
            self._is_inside, self._may_open = True, False
        elif scanner.is_whole or not opening.startswith(rest):
            self._may_open, self.is_over = False, True

    def _thought(self) -> str:
        """Read reasoning, and the closing tag if it is there."""
        scanner = self._scanner
        text, is_next = scanner.take_before(self._tags.closing)
        if is_next:
            scanner.take(len(self._tags.closing))
            self._is_inside = False
        text = self._space + (text if self._has_begun else text.lstrip())
        shown = text.rstrip()
        self._has_begun = self._has_begun or bool(shown)
        self._space = text[len(shown) :]
        return shown

    def _answer(self) -> str:
        """Read the answer, without the white space between the closing tag and it."""
        scanner = self._scanner
        if not self.is_over:
            scanner.take(len(scanner.rest) - len(scanner.rest.lstrip()))
            self.is_over = bool(scanner.rest)
        return scanner.take(len(scanner.rest))
