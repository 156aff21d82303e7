"""StepBudget: how long a step may take, and how much of a prompt fits into that.

While somebody decodes, a step's time is everybody's gap between two tokens. Prompts get what the
rows that decode leave of the target. When nobody decodes, only the number of tokens is limited.
"""

from collections.abc import Iterable, Sequence

from engine.scheduler.request import Request
from engine.scheduler.step_time import StepShape, StepTime, num_pairs

# Without a target: a step with prompts may take this many times as long as without, and by as much
# again for every two requests that wait for their first token where one decodes. So prompts come
# fast enough to keep the batch full, when answers are half as long as prompts: the more of them
# wait, the fewer decode, and the fewer gaps a longer step makes.
AUTO_RATIO = 2.5
AUTO_LEAST_S = 0.05  # nobody reads faster than 20 tokens a second; shorter steps only cost more
LEAST_PIECE = 16  # tokens of the first prompt in a step, whatever the target: it always advances


class PromptTime:
    """The seconds of one step that are left for prompts."""

    def __init__(self, times: StepTime, seconds: float) -> None:
        self._times = times
        self._left_s = seconds
        self._is_spent = False

    @property
    def is_over(self) -> bool:
        """Whether no further piece of a prompt should be added to the step."""
        return self._is_spent and self._times.piece_within(self._left_s, 0) < LEAST_PIECE

    def piece(self, start: int, most: int) -> int:
        """Return how many of the next `most` tokens from position `start` fit."""
        return min(most, max(LEAST_PIECE, self._times.piece_within(self._left_s, start)))

    def spend(self, start: int, count: int) -> None:
        self._is_spent = True
        self.lend(start, count)

    def lend(self, start: int, count: int) -> None:
        """Take the time of tokens that are no prompt's: the least piece of one still fits."""
        self._left_s -= self._times.seconds_added(
            StepShape(tokens=count, pairs=num_pairs(start, count))
        )

    def share(self, part: int) -> int:
        """Return how many tokens fit into one of so many equal parts of the time."""
        return self._times.piece_within(self._left_s / part, 0)


class StepBudget:
    """The target for the time of a step that computes prompts while somebody decodes."""

    def __init__(self, target_s: float | None) -> None:
        """None: the target follows the time of a step that only decodes."""
        self._target_s = target_s
        self.times = StepTime()

    def prompt_time(
        self, decodes: Sequence[tuple[Request, int]], num_prompts: int
    ) -> PromptTime | None:
        """Return the time for prompts beside these decodes; None before any step was measured.

        `num_prompts`: requests that could be computed and have no token yet.
        """
        if not self.times.is_known:
            return None
        decode_s = self.times.predict(decode_shape(decodes))
        target_s = self.target_s(decode_s, num_prompts / max(len(decodes), 1))
        return PromptTime(self.times, target_s - decode_s)

    def target_s(self, decode_s: float, prompts_per_decode: float) -> float:
        """Return the target for a step in which decoding alone takes `decode_s`."""
        if self._target_s is not None:
            return self._target_s
        return max(AUTO_LEAST_S, AUTO_RATIO * decode_s * (1 + prompts_per_decode / 2))


def decode_shape(rows: Iterable[tuple[Request, int]]) -> StepShape:
    """The shape of a step that computes `count` tokens of each request, all with logits."""
    tokens = positions_read = 0
    for request, count in rows:
        tokens += count
        positions_read += request.num_computed_tokens + count
    return StepShape(tokens, tokens, positions_read)
