"""When silence is a hang, with seconds that pass when the test says so."""

import pytest

from engine import liveness as module
from engine.liveness import Liveness
from engine.process_usage import ProcessUsage

TICK_S = 0.25
IDLE, COMPUTES, WAITS = (
    ProcessUsage(0.0, 0.0),
    ProcessUsage(TICK_S, 0.0),
    ProcessUsage(0.01, TICK_S - 0.01),
)


class Watched:
    """A process that is watched as a handle does it; it answers pings unless it is held."""

    def __init__(self, hang_timeout_s: float = 120.0, may_compile: bool = False) -> None:
        self._may_compile = may_compile
        self.liveness = Liveness(120.0, hang_timeout_s)
        self.liveness.begin()
        self.num_pings = 0

    def is_stepping(self) -> "Watched":
        self.liveness.hear_ready(self._may_compile)
        return self

    def silent(self, seconds: float, usage: ProcessUsage | None = IDLE) -> float | None:
        """Return after how many seconds it is taken for hanging; None if it is not."""
        for number in range(round(seconds / TICK_S)):
            metered = usage if self.liveness.wants_usage else None
            self.liveness.pass_time(TICK_S, metered)
            if self.liveness.is_hanging:
                return (number + 1) * TICK_S
            if self.liveness.wants_ping:
                self.liveness.ping()
                self.num_pings += 1
        return None

    def step(self, seconds: float, usage: ProcessUsage = COMPUTES) -> None:
        assert self.silent(seconds, usage) is None
        self.liveness.hear_step()

    def busy(self, work: str, seconds: float, patience_s: float | None = None) -> None:
        self.liveness.hear_busy(work, patience_s)
        assert self.silent(seconds, COMPUTES) is None


def test_a_stopped_process_is_noticed_after_five_seconds() -> None:
    assert Watched().is_stepping().silent(60) == module.MIN_HANG_S == 5.0


def test_a_silent_process_is_pinged_once() -> None:
    watched = Watched().is_stepping()
    watched.silent(4)
    assert watched.num_pings == 1
    watched.liveness.hear_step()
    watched.silent(4)
    assert watched.num_pings == 2


def test_an_idle_process_teaches_nothing_about_steps() -> None:
    watched = Watched().is_stepping()
    for _ in range(100):
        watched.step(0.25, IDLE)
    assert watched.liveness.longest_step_s == 0.0
    assert watched.silent(60) == 5.0


def test_ten_times_the_longest_step_is_a_hang() -> None:
    watched = Watched().is_stepping()
    watched.step(0.5)
    watched.step(3.25)
    watched.step(0.5)
    assert watched.liveness.longest_step_s == 3.0, "from the ping on"
    assert watched.silent(100) == 30.0


def test_what_was_learned_of_steps_holds_for_the_next_process() -> None:
    watched = Watched().is_stepping()
    watched.step(3.25)
    watched.liveness.begin()
    assert watched.is_stepping().silent(100) == 30.0


def test_the_silence_in_which_a_process_ended_counts_as_no_step() -> None:
    watched = Watched().is_stepping()
    assert watched.silent(60) == 5.0
    watched.liveness.begin()
    assert watched.is_stepping().silent(60) == 5.0


def test_the_limit_between_steps_is_the_most() -> None:
    watched = Watched(hang_timeout_s=20.0).is_stepping()
    watched.step(3.25)
    assert watched.silent(100) == 20.0
    assert Watched(hang_timeout_s=1.0).is_stepping().silent(100) == 1.0


def test_a_start_may_be_silent_for_longer() -> None:
    assert Watched().silent(200) == 120.0


def test_a_start_that_gives_news_may_take_any_time() -> None:
    watched = Watched()
    for _ in range(100):
        watched.busy("weights", 60.0)
    assert watched.silent(200) == 120.0 - 60.0


def test_work_may_announce_its_own_patience() -> None:
    watched = Watched()
    watched.busy("compiling", 500.0, patience_s=900.0)
    assert watched.silent(1000) == 400.0
    watched.busy("weights", 10.0)
    assert watched.silent(1000) == 110.0


def test_a_step_that_was_announced_may_take_long_and_counts_as_a_step() -> None:
    watched = Watched().is_stepping()
    watched.busy("a step of 128 tokens", 8.0)
    watched.liveness.hear_step()
    assert watched.liveness.longest_step_s == 8.0
    assert watched.silent(200) == 80.0


def test_a_compilation_within_a_step_does_not_count_as_one() -> None:
    watched = Watched().is_stepping()
    watched.busy("a step of 128 tokens", 1.0)
    watched.busy("compiling", 60.0)
    watched.busy("the rest of the step", 1.0)
    watched.liveness.hear_step()
    assert watched.liveness.longest_step_s == 1.0


def test_a_process_that_computes_for_no_reason_is_noticed_as_soon() -> None:
    assert Watched().is_stepping().silent(200, COMPUTES) == module.MIN_HANG_S


def test_one_that_may_compile_a_kernel_gets_more_time() -> None:
    limit_s = module.MIN_COMPUTING_HANG_S
    watched = Watched(may_compile=True).is_stepping()
    assert watched.silent(200, COMPUTES) == limit_s > module.MIN_HANG_S


def test_a_process_that_is_stopped_amid_a_long_step_is_noticed_as_soon() -> None:
    watched = Watched(may_compile=True).is_stepping()
    assert watched.silent(20, COMPUTES) is None
    assert watched.silent(60) == module.MIN_HANG_S


def test_where_nothing_is_known_of_a_process_it_counts_as_computing() -> None:
    assert Watched().is_stepping().silent(200, None) == module.MIN_COMPUTING_HANG_S


def test_a_process_that_waits_for_processors_is_not_taken_for_hanging() -> None:
    noticed_s = Watched().is_stepping().silent(3600, WAITS)
    assert noticed_s is not None and noticed_s > 30, "but some time it is"


def test_a_watcher_that_was_held_up_itself_counts_little_of_that_time() -> None:
    watched = Watched().is_stepping()
    for _ in range(5):
        watched.liveness.pass_time(60.0, None)
        assert not watched.liveness.is_hanging
    assert watched.liveness.silent_s == 5 * module.MAX_TICK_S


def test_a_part_of_a_long_message_is_a_sign_of_life() -> None:
    watched = Watched().is_stepping()
    for _ in range(20):
        assert watched.silent(4.0) is None
        watched.liveness.hear_part()


@pytest.mark.parametrize("load", [2, 4, 8])
def test_on_a_machine_with_more_work_a_step_may_take_as_many_times_longer(load: int) -> None:
    """Twenty times as long as the longest step so far, of which it has the processor a part."""
    watched = Watched().is_stepping()
    watched.step(2.25)
    usage = ProcessUsage(TICK_S / load, TICK_S * (1 - 1 / load))
    assert watched.silent(2.0 * load, usage) is None
    watched.liveness.hear_step()
