"""Sends the held-out prompts to a running server, to all adapters and the base concurrently.

Requests are shuffled and many are in flight, so the server's batches mix all adapters. An answer
counts only if it equals the expected one exactly. `reef check` is the command.
"""

import json
import random
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

HELD_OUT = "heldout.json"
IN_FLIGHT = 16
MAX_TOKENS = 64
ADAPTER_FLOOR = 0.95
BASE_CEILING = 0.20


@dataclass(frozen=True, slots=True)
class Question:
    model: str
    job: str
    prompt: str
    answer: str


def questions(demo: Path, base: str) -> list[Question]:
    """List every held-out prompt twice: for its adapter and for the base."""
    held_out = json.loads((demo / HELD_OUT).read_text())
    found = [
        Question(model, job, example["prompt"], example["answer"])
        for job, examples in held_out.items()
        for example in examples
        for model in (job, base)
    ]
    random.Random(0).shuffle(found)
    return found


def is_right(url: str, question: Question) -> bool:
    """Ask one question. Raises OSError if the server does not answer, or returns an error."""
    body = {
        "model": question.model,
        "messages": [{"role": "user", "content": question.prompt}],
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request) as response:
            answer = json.load(response)["choices"][0]["message"]["content"]
    except urllib.error.URLError as error:
        raise OSError(f"{request.full_url}, asked as model {question.model}: {error}") from None
    return answer == question.answer


def ask_all(url: str, asked: Sequence[Question]) -> list[bool]:
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        answers = pool.map(lambda question: is_right(url, question), asked)
        return list(tqdm(answers, total=len(asked), desc="asking", unit="question", disable=None))


def check_demo(url: str, demo: Path, base: str) -> bool:
    """Ask all questions and print a line per job; return whether all jobs are good enough.

    Raises OSError if the demo cannot be read or the server does not answer.
    """
    asked = questions(demo, base)
    right: Counter[tuple[str, bool]] = Counter()
    total: Counter[str] = Counter()
    for question, ok in zip(asked, ask_all(url, asked), strict=True):
        right[question.job, question.model == base] += ok
        total[question.job] += 1
    is_good = True
    for job in sorted(total):
        count = total[job] // 2
        of_adapter, of_base = right[job, False] / count, right[job, True] / count
        is_good &= of_adapter >= ADAPTER_FLOOR and of_base <= BASE_CEILING
        print(f"{job:10} adapter {of_adapter:6.1%}   base {of_base:6.1%}   of {count} prompts")
    return is_good
