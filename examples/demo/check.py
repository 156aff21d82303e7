"""Asks a running server the held-out prompts, all adapters and the base at the same time.

    python -m examples.demo.check [http://127.0.0.1:8000] [--demo .data/demo] [--base demo]

Requests are shuffled and many are in flight, so a batch of the server mixes all adapters. An
answer counts if it is letter by letter the wanted one. Exits with 1 if an adapter gets less than
95 % right or the base more than 20 %.
"""

import argparse
import json
import random
import sys
import urllib.request
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

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
    """Every held-out prompt twice: for its adapter and for the base."""
    held_out = json.loads((demo / "heldout.json").read_text())
    found = [
        Question(model, job, example["prompt"], example["answer"])
        for job, examples in held_out.items()
        for example in examples
        for model in (job, base)
    ]
    random.Random(0).shuffle(found)
    return found


def is_right(url: str, question: Question) -> bool:
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
    with urllib.request.urlopen(request) as response:
        answer = json.load(response)["choices"][0]["message"]["content"]
    return answer == question.answer


def ask_all(url: str, asked: Sequence[Question]) -> list[bool]:
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        answers = pool.map(lambda question: is_right(url, question), asked)
        return list(tqdm(answers, total=len(asked), desc="asking", unit="question"))


def main() -> int:
    parser = argparse.ArgumentParser(description="Check the demo's adapters through a server.")
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:8000")
    parser.add_argument("--demo", type=Path, default=Path(".data/demo"))
    parser.add_argument("--base", default="demo", help="the base model's id")
    options = parser.parse_args()
    asked = questions(options.demo, options.base)
    right: Counter[tuple[str, bool]] = Counter()
    total: Counter[str] = Counter()
    for question, ok in zip(asked, ask_all(options.url, asked), strict=True):
        right[question.job, question.model == options.base] += ok
        total[question.job] += 1
    is_good = True
    for job in sorted(total):
        count = total[job] // 2
        adapter, base = right[job, False] / count, right[job, True] / count
        is_good &= adapter >= ADAPTER_FLOOR and base <= BASE_CEILING
        print(f"{job:10} adapter {adapter:6.1%}   base {base:6.1%}   of {count} prompts")
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
