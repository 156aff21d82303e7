"""Workload: generates the requests of a benchmark, as a pure function of its arguments."""

import argparse
import random
from dataclasses import dataclass

TRAFFIC = ("base", "identical", "distinct", "uniform", "skewed", "mixed")


@dataclass(frozen=True, slots=True)
class Lengths:
    """A uniform distribution between two numbers of tokens, both included."""

    low: int
    high: int

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"


@dataclass(frozen=True, slots=True)
class Job:
    """One request. `adapter` is an index, None for the base model."""

    prompt_token_ids: list[int]
    num_output_tokens: int
    adapter: int | None


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests of one kind; `traffic` decides which adapters they use:

    base        none                         uniform   any, with equal probability
    identical   always the first             skewed    the k-th with probability ~ 1 / k (Zipf)
    distinct    each in turn                 mixed     half the base, half any adapter
    """

    traffic: str
    num_requests: int
    num_adapters: int
    prompt: Lengths
    output: Lengths
    vocab_size: int
    seed: int = 0

    def jobs(self) -> list[Job]:
        """Generate the jobs. Lengths and prompts are the same for all traffics."""
        texts, popularity = random.Random(self.seed), random.Random(self.seed + 1)
        return [
            Job(
                self._prompt(texts),
                texts.randint(self.output.low, self.output.high),
                self._adapter(i, popularity),
            )
            for i in range(self.num_requests)
        ]

    def _prompt(self, rng: random.Random) -> list[int]:
        length = rng.randint(self.prompt.low, self.prompt.high)
        return [rng.randrange(1, self.vocab_size) for _ in range(length)]

    def _adapter(self, i: int, rng: random.Random) -> int | None:
        if self.traffic == "base" or (self.traffic == "mixed" and rng.random() < 0.5):
            return None
        if self.traffic == "identical":
            return 0
        if self.traffic == "distinct":
            return i % self.num_adapters
        if self.traffic == "skewed":
            weights = [1 / (k + 1) for k in range(self.num_adapters)]
            return rng.choices(range(self.num_adapters), weights)[0]
        return rng.randrange(self.num_adapters)


def lengths(text: str) -> Lengths:
    """Parse `64` or `32-128`, for argparse."""
    low, _, high = text.partition("-")
    try:
        found = Lengths(int(low), int(high or low))
    except ValueError:
        found = Lengths(0, 0)
    if not 1 <= found.low <= found.high:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens, or low-high")
    return found
