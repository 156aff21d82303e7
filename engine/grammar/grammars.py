"""Grammars: what an engine knows of grammars. All work on them is done in other processes."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from engine.grammar.cache import GrammarCache
from engine.grammar.link import GrammarLink, Tokens
from engine.grammar.mask_memory import MaskMemory
from engine.grammar.masks import MaskMaker, StepMasks
from engine.messages import ErrorKind, RequestError
from engine.scheduler.request import Request


def refusal_of_model(folder: Path, is_wanted: bool, eos_token_ids: tuple[int, ...]) -> str:
    """Why outputs of this model cannot be held to a grammar; empty if they can."""
    if not is_wanted:
        return "structured output is switched off for this model"
    if not (folder / "tokenizer.json").is_file():
        return "structured output needs the model's tokenizer.json, which is not there"
    if not eos_token_ids:
        return "structured output needs an end token, and the model has none"
    return ""


class Grammars:
    """Belongs to the step loop. `wake` is called in another thread when there is news.

    `num_slots` requests may run, with at most `max_drafts` drafts each.
    """

    def __init__(
        self, tokens: Tokens, num_slots: int, wake: Callable[[], None], max_drafts: int = 0
    ) -> None:
        self._memory = MaskMemory.create(num_slots, tokens.vocab_size, 1 + max_drafts)
        self._cache = GrammarCache(lambda: GrammarLink(tokens, self._memory), wake)
        self._masks = MaskMaker(self._cache, self._memory)

    def want(self, tenant: str, grammar: str, num_requests: int) -> bool:
        """Have a grammar compiled for so many requests; False if they must wait for `poll`."""
        return self._cache.want(tenant, grammar, num_requests)

    def release(self, grammar: str) -> None:
        """Count one request less that uses the grammar."""
        self._cache.release(grammar)

    @property
    def has_news(self) -> bool:
        return self._cache.has_news

    def poll(self) -> Iterator[tuple[str, RequestError | None]]:
        """List grammars that are ready, or that will never be, with the reason."""
        for entry in self._cache.poll():
            if entry.link is not None or entry.verdict is None:
                yield entry.grammar, None
                continue
            kind = ErrorKind.INVALID_REQUEST if entry.verdict.is_lasting else ErrorKind.OVERLOADED
            yield entry.grammar, RequestError(kind, f"Structured output: {entry.verdict.error}")

    def begin(
        self,
        rows: Iterable[tuple[int, Request]],
        running: Iterable[Request],
        drafts: Mapping[int, list[int]],
    ) -> StepMasks:
        """Have the masks computed of a step's rows: each an index in the batch, and its request.

        `drafts` are those of some rows, by index.
        """
        return self._masks.begin(rows, {r.key: r.life for r in running}, drafts)

    def close(self) -> None:
        self._cache.compiler.close()
        self._memory.close()
