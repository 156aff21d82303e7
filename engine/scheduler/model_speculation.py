"""ModelSpeculation: chooses how much a draft model guesses, before it does."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from engine.scheduler.request import Request
from engine.scheduler.speculation import Speculation
from engine.scheduler.step_budget import decode_shape
from engine.scheduler.step_time import StepTime

FIRST_MATCH = 4  # a model's first guess is for acceptance what follows a match of so many tokens


@dataclass(slots=True)
class ModelSpeculation(Speculation):
    """A guess costs its part of a step of the draft model, beside its row."""

    def wishes(
        self, requests: Sequence[Request], times: StepTime, least: float
    ) -> list[tuple[Request, int]]:
        step_s = times.predict(decode_shape((request, 1) for request in requests))
        least += self.drafter.step_s / max(step_s, 1e-9)
        wishes: list[tuple[Request, int]] = []
        for request in requests:
            most = self.most(request)
            if most <= 0:
                continue
            acceptance = self.acceptance(request)
            chances = [-chance for chance in acceptance.chances(FIRST_MATCH, most)]
            count = bisect_right(chances, -least)
            if count:
                wishes.append((request, count))
            else:
                acceptance.decline(FIRST_MATCH)
        return wishes
