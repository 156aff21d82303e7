"""TimedRun: steps of a DecodeRun with the times at which they end."""

from bisect import bisect_left
from itertools import accumulate
from operator import sub

from deployments.simulator.disturbance import Disturbance
from deployments.simulator.profile import Profile, StepWork
from deployments.simulator.records import Stretch
from engine.scheduler.decode_run import DecodeRun
from engine.scheduler.scheduler import Scheduler
from engine.scheduler.step_time import StepShape


class TimedRun:
    """The newest scheduled step is in progress; those before it have ended."""

    def __init__(
        self,
        run: DecodeRun,
        work: StepWork,  # of the first step
        scheduler: Scheduler,
        profile: Profile,
        now_s: float,
        disturbance: Disturbance,
        number: int,  # of the first step, among all of the replica
    ) -> None:
        self.run = run
        self._scheduler = scheduler
        self.num_steps = run.num_possible
        self._first = work.shape
        self._steps_s = profile.decodes_s(work, run.num_possible)
        if not disturbance.is_none:
            steps = enumerate(self._steps_s, number)
            self._steps_s = [step_s + disturbance.of_step(at) for at, step_s in steps]
        self._ends_s = list(accumulate(self._steps_s, initial=now_s))[1:]

    @property
    def end_s(self) -> float:
        return self._ends_s[self.num_steps - 1]

    @property
    def num_left_tokens(self) -> int:
        """Tokens of the step's budget that are left for prompts."""
        return self._scheduler.limits.max_num_batched_tokens - len(self.run.rows)

    @property
    def num_before_last(self) -> int:
        """Steps that are not ended and are not the last one."""
        return self.num_steps - self.run.num_scheduled

    def num_over(self, now_s: float) -> int:
        """Return how many steps have ended before now that are in progress yet."""
        num_ended = min(bisect_left(self._ends_s, now_s), self.num_steps - 1)
        return num_ended - self.run.num_scheduled + 1

    def pass_steps(self, count: int) -> Stretch:
        """End `count` steps and schedule as many."""
        stretch = self._end(count)
        self.run.schedule(self._scheduler.memory, count)
        return stretch

    def pass_last(self) -> Stretch:
        """End the step in progress; the scheduler is to update it next."""
        return self._end(1)

    def shorten(self) -> bool:
        """Let the step in progress be the last one; False if it is."""
        is_shorter = self.num_before_last > 0
        self.num_steps = self.run.num_scheduled
        return is_shorter

    def _end(self, count: int) -> Stretch:
        first = self.run.num_scheduled - 1
        ends_s = self._ends_s[first : first + count]
        tokens, logit_rows, positions_read, pairs = self._first
        shape = StepShape(tokens, logit_rows, positions_read + first * tokens, pairs)
        times = self._scheduler.step_budget.times
        times.observe_decodes(shape, self._steps_s[first : first + count])
        gap_s = max(map(sub, ends_s[1:], ends_s), default=0.0)
        return Stretch(ends_s[0], ends_s[-1], gap_s, count)
