"""Turn bad words into the token sequences that may not be generated, as vLLM does."""

from collections.abc import Iterator, Sequence

from deployments.ingress.prompt_texts import in_thread
from deployments.text.vocabulary import Vocabulary

TokenIds = tuple[int, ...]


async def encode_bad_words(vocabulary: Vocabulary, words: Sequence[str]) -> tuple[TokenIds, ...]:
    """Encode words as they begin a text and as they follow others."""
    if not words:
        return ()

    def encode() -> tuple[TokenIds, ...]:
        found = (ids for word in words for ids in _spellings(vocabulary, word.lstrip()))
        return tuple(dict.fromkeys(found))

    return await in_thread(encode, sum(map(len, words)))


def _spellings(vocabulary: Vocabulary, word: str) -> Iterator[TokenIds]:
    """Encode a word without a space before it, and with one if that is another first token alone.

    Otherwise the space is a token of its own, or the word is spelled quite differently.
    """
    bare = tuple(vocabulary.encode(word, False))
    spaced = tuple(vocabulary.encode(f" {word}", False))
    if bare:
        yield bare
    if bare and len(spaced) == len(bare) and spaced[0] != bare[0]:
        yield spaced
