"""Liveness: judge by its silence whether an engine process hangs.

    stepping   a frame per step, and an answer to every ping between two steps
    busy       with something long that it has announced: loading, compiling, a first large step

Silence counts from the last message. It is measured in the process's own time: time that it waits
for a processor or a disk counts a tenth, because a loaded machine makes every process slow. Reads
no clock and no process: the caller says what has passed and what came.
"""

from dataclasses import dataclass

from engine.process_usage import ProcessUsage

PING_AFTER_S = 0.25  # of silence; an idle process says nothing of its own accord
METER_AFTER_S = 1.0  # of silence, so that a process that answers costs no measurement
MAX_TICK_S = 0.5  # of silence between two calls: the caller itself may have been held up

MAX_STEPS = 10  # a silence of this many times the longest step is a hang
MIN_HANG_S = 5.0
# For a process that computes and may compile a kernel meanwhile, which was not announced; and where
# it is not known what a process does.
MIN_COMPUTING_HANG_S = 30.0
_COMPUTING_SHARE = 0.2  # of its own time, from which on it counts as computing
_WAITING_WEIGHT = 0.1


@dataclass(slots=True)
class _Silence:
    """Seconds since the last message, in the process's own time."""

    total_s: float = 0.0
    still_s: float = 0.0  # since the process computed anything
    since_ping_s: float | None = None
    is_metered: bool = False


class Liveness:
    """One for a client's life: what is learned of a model's steps holds for the next process.

    `max_silence_s` holds while the process is busy, unless it announces another patience;
    `hang_timeout_s` is the most between steps. All steps that may take long are announced, but for
    kernels that are compiled amid them.
    """

    def __init__(self, max_silence_s: float, hang_timeout_s: float) -> None:
        self.longest_step_s = 0.0
        self.work = ""  # what the process is busy with; empty between steps
        self._max_silence_s = max_silence_s
        self._hang_timeout_s = hang_timeout_s
        self._patience_s = max_silence_s
        self._may_compile = True
        self._silence = _Silence()

    # ---- what came -----------------------------------------------------------------------

    def begin(self) -> None:
        """A new process was started. The silence in which the last one ended was no step."""
        self._silence = _Silence()
        self.hear_busy("starting", None)

    def hear_busy(self, work: str, patience_s: float | None) -> None:
        if not self.work:
            self._learn_step()
        self.work = work
        self._patience_s = self._max_silence_s if patience_s is None else patience_s
        self._silence = _Silence()

    def hear_ready(self, may_compile: bool) -> None:
        self.work = ""
        self._may_compile = may_compile
        self._silence = _Silence()

    def hear_step(self) -> None:
        self._learn_step()
        self.work = ""
        self._silence = _Silence()

    def hear_part(self) -> None:
        """A part of a message came."""
        self._silence = _Silence()

    def _learn_step(self) -> None:
        """An idle process is silent up to the ping: only what follows that may be a step."""
        silence = self._silence
        step_s = silence.total_s if self.work else silence.since_ping_s or 0.0
        self.longest_step_s = max(self.longest_step_s, step_s)

    # ---- what passed ---------------------------------------------------------------------

    @property
    def wants_ping(self) -> bool:
        silence = self._silence
        return not self.work and silence.since_ping_s is None and silence.total_s >= PING_AFTER_S

    @property
    def is_waiting(self) -> bool:
        """Whether the process is at work that it has announced, or owes an answer to a ping."""
        return bool(self.work) or self._silence.since_ping_s is not None

    @property
    def wants_usage(self) -> bool:
        return self._silence.total_s >= METER_AFTER_S

    def ping(self) -> None:
        self._silence.since_ping_s = 0.0

    def pass_time(self, elapsed_s: float, usage: ProcessUsage | None) -> None:
        """Count silence. `usage`: what the process did meanwhile, if that is known."""
        silence = self._silence
        own_s = min(elapsed_s, MAX_TICK_S)
        if usage is not None:
            silence.is_metered = True
            own_s -= (1 - _WAITING_WEIGHT) * min(usage.waiting_s, own_s)
            if usage.computing_s >= _COMPUTING_SHARE * own_s:
                silence.still_s = -own_s
        silence.still_s += own_s
        silence.total_s += own_s
        if silence.since_ping_s is not None:
            silence.since_ping_s += own_s

    # ---- the verdict ---------------------------------------------------------------------

    @property
    def silent_s(self) -> float:
        return self._silence.total_s

    @property
    def is_hanging(self) -> bool:
        silence = self._silence
        if self.work:
            return silence.total_s >= self._patience_s
        is_still = silence.is_metered and silence.still_s >= self._limit_s(MIN_HANG_S)
        knows_all = silence.is_metered and not self._may_compile
        least_s = MIN_HANG_S if knows_all else MIN_COMPUTING_HANG_S
        return is_still or silence.total_s >= self._limit_s(least_s)

    def _limit_s(self, least_s: float) -> float:
        return min(max(least_s, MAX_STEPS * self.longest_step_s), self._hang_timeout_s)
