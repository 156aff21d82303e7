"""Turn the texts of a request into token ids, without making other requests wait.

A text that cannot fit the context whatever its tokens are is refused by its length. Short ones are
encoded at once, long ones in a thread of a small pool, where the encoder runs without the GIL.
"""

import asyncio
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from deployments.ingress.http_errors import ApiError, invalid
from deployments.text.vocabulary import TooManyTokens, Vocabulary

T = TypeVar("T")
LONG_TEXT = 4000  # characters of all texts of a request; more are encoded in a thread

# One core is left to the event loop.
_threads = ThreadPoolExecutor(
    max_workers=max(1, min(4, (os.cpu_count() or 1) - 1)), thread_name_prefix="encode"
)


def prompt_too_long(path: str, num_tokens: int, limit: int) -> ApiError:
    return invalid(
        f"The prompt has {num_tokens} tokens, and the model's context of {limit} tokens must hold "
        "the answer too.",
        path,
        "context_length_exceeded",
    )


def text_too_long(path: str, num_tokens: int, limit: int) -> ApiError:
    return invalid(
        f"The text has {num_tokens} tokens, and the model's context holds {limit}. "
        "truncate_prompt_tokens keeps the last ones of a longer text.",
        path,
        "context_length_exceeded",
    )


def prompt_room(wanted_max_tokens: int | None, limit: int) -> int:
    """Count the tokens of the context that an answer of so many leaves to the prompt."""
    return max(1, limit - max(1, wanted_max_tokens or 1))


def kept_tokens(wanted: int | None, most: int) -> int | None:
    """Settle truncate_prompt_tokens; -1 is as many as there may be. Raises ApiError."""
    name = "truncate_prompt_tokens"
    if wanted is not None and wanted != -1 and not 1 <= wanted <= most:
        raise invalid(f"{name} must be -1 or in [1, {most}], not {wanted}.", name)
    return most if wanted == -1 else wanted


async def encode_texts(
    vocabulary: Vocabulary,
    texts: Mapping[str, Sequence[str]],
    add_special_tokens: bool,
    limit: int,
    keep_last: int | None = None,
    too_long: Callable[[str, int, int], ApiError] = prompt_too_long,
) -> list[list[int]]:
    """Encode texts by their paths in the request, each in pieces and of `limit` tokens at most.

    With `keep_last`, so many tokens of each text are kept, and it may be longer. Raises ApiError;
    that a text leaves no room for an answer is left to the caller.
    """
    num_characters = 0
    for path, pieces in texts.items():
        check_length(vocabulary, path, pieces, limit)
        num_characters += sum(map(len, pieces))
    is_short = num_characters <= LONG_TEXT and keep_last is None
    if is_short and all(len(pieces) == 1 for pieces in texts.values()):
        return [vocabulary.encode(text, add_special_tokens) for [text] in texts.values()]
    most, keeps_last = limit if keep_last is None else keep_last, keep_last is not None
    loop = asyncio.get_running_loop()
    prompts: list[list[int]] = []
    for path, pieces in texts.items():
        try:
            prompts.append(
                await loop.run_in_executor(
                    _threads,
                    vocabulary.encode_pieces,
                    pieces,
                    add_special_tokens,
                    most,
                    keeps_last,
                )
            )
        except TooManyTokens as error:
            raise too_long(path, error.num_tokens, limit) from None
    return prompts


async def encode_prompts(
    vocabulary: Vocabulary,
    prompts: Mapping[str, str | list[int]],
    add_special_tokens: bool,
    limit: int,
    keep_last: int | None = None,
    too_long: Callable[[str, int, int], ApiError] = prompt_too_long,
) -> list[list[int]]:
    """Take the token ids that were given, or encode the texts: a request has one kind alone.

    Prompts are by their paths; the rest is as with `encode_texts`.
    """
    texts = {path: [prompt] for path, prompt in prompts.items() if isinstance(prompt, str)}
    if texts:
        return await encode_texts(vocabulary, texts, add_special_tokens, limit, keep_last, too_long)
    return [ids[-(keep_last or 0) :] for ids in prompts.values() if isinstance(ids, list)]


async def in_thread(work: Callable[[], T], num_tokens: int) -> T:
    """Do work that takes longer the more tokens there are: with few at once, else in a thread."""
    if num_tokens <= LONG_TEXT:
        return work()
    return await asyncio.get_running_loop().run_in_executor(_threads, work)


def check_length(vocabulary: Vocabulary, path: str, texts: Iterable[str], limit: int) -> None:
    """Refuse texts that together cannot fit the context, whatever their tokens are."""
    longest = vocabulary.longest_token
    texts = list(texts)
    if longest is None or 4 * sum(map(len, texts)) <= limit * longest:
        return
    num_bytes = sum(len(text.encode()) for text in texts)
    if num_bytes > limit * longest:
        raise invalid(
            f"The text has {num_bytes} bytes, and the model's context of {limit} tokens holds at "
            f"most {limit * longest}: no token is longer than {longest} bytes.",
            path,
            "context_length_exceeded",
        )
