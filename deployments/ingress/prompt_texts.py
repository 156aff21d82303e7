"""Turn the texts of a request into token ids, without making other requests wait.

A text that cannot fit the context whatever its tokens are is refused by its length. Short ones are
encoded at once, long ones in a thread of a small pool, where the encoder runs without the GIL.
"""

import asyncio
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from deployments.ingress.http_errors import ApiError, invalid
from deployments.text.vocabulary import TooManyTokens, Vocabulary

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


async def encode_texts(
    vocabulary: Vocabulary, texts: Mapping[str, str], add_special_tokens: bool, limit: int
) -> list[list[int]]:
    """Encode texts by their paths in the request, each of `limit` tokens at most.

    Raises ApiError; one for a text that leaves no room for an answer may be left to the caller.
    """
    for path, text in texts.items():
        _check_length(vocabulary, path, text, limit)
    if sum(map(len, texts.values())) <= LONG_TEXT:
        return [vocabulary.encode(text, add_special_tokens) for text in texts.values()]
    loop = asyncio.get_running_loop()
    prompts: list[list[int]] = []
    for path, text in texts.items():
        try:
            prompts.append(
                await loop.run_in_executor(
                    _threads, vocabulary.encode_aside, text, add_special_tokens, limit
                )
            )
        except TooManyTokens as error:
            raise prompt_too_long(path, error.num_tokens, limit) from None
    return prompts


def _check_length(vocabulary: Vocabulary, path: str, text: str, limit: int) -> None:
    longest = vocabulary.longest_token
    if longest is None or 4 * len(text) <= limit * longest:
        return
    num_bytes = len(text.encode())
    if num_bytes > limit * longest:
        raise invalid(
            f"The text has {num_bytes} bytes, and the model's context of {limit} tokens holds at "
            f"most {limit * longest}: no token is longer than {longest} bytes.",
            path,
            "context_length_exceeded",
        )
