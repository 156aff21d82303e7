"""Capacity: what one replica can carry, as its own steps have shown, and how much of it is used.

A step takes `step_s`, and `row_s` more for each request that gets a token. A replica therefore has
as many seats as get their tokens in time, and so many tokens per second; prompts take the time that
they take alone. Figures that have not been measured are 0, and limit nothing.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Objective:
    """What requests should get: seconds to the first token, and for each further one."""

    ttft_s: float = 2.0
    tpot_s: float = 0.2


@dataclass(frozen=True, slots=True)
class Capacity:
    """What one replica can do."""

    max_num_seqs: float = 1.0
    tokens_per_s: float = 0.0  # of prompts, in steps that are full of them
    step_s: float = 0.0  # of a step, before its first row
    row_s: float = 0.0  # by which each row that gets a token makes it longer

    @property
    def least_tpot_s(self) -> float:
        """How often a request that is alone gets a token; 0 if that is not known."""
        return self.step_s + self.row_s

    def seats(self, tpot_s: float) -> float:
        """Return how many requests get a token every `tpot_s`: at least one."""
        if self.row_s <= 0:
            return self.max_num_seqs
        return min(max((tpot_s - self.step_s) / self.row_s, 1.0), self.max_num_seqs)

    def output_tokens_per_s(self, tpot_s: float) -> float:
        """Return the tokens per second of all seats; infinite if nothing was measured."""
        seats = self.seats(tpot_s)
        seconds = self.step_s + seats * self.row_s
        return seats / seconds if seconds > 0 else math.inf

    def prompt_s(self, num_tokens: float) -> float:
        """Return the seconds that so many prompt tokens take; 0 if that is not known."""
        return num_tokens / self.tokens_per_s if self.tokens_per_s > 0 else 0.0

    def work(self, prompt_tokens_per_s: float, output_tokens_per_s: float, tpot_s: float) -> float:
        """Return the part of this replica, 1 for all of it, that such traffic takes."""
        prompts = self.prompt_s(prompt_tokens_per_s)
        return prompts + output_tokens_per_s / self.output_tokens_per_s(tpot_s)
