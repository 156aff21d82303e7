"""Tests how the sizes of prompts' pieces follow the time of steps, on a clock of the test's own."""

import random
from dataclasses import replace

import pytest

from engine.scheduler.adapter_slots import AdapterSlots
from engine.scheduler.batch import ScheduledBatch
from engine.scheduler.block_manager import BlockManager
from engine.scheduler.limits import SchedulerLimits
from engine.scheduler.memory import MemoryBudget
from engine.scheduler.request import CacheScope, Request, SamplingParams
from engine.scheduler.scheduler import Scheduler
from engine.scheduler.step_budget import AUTO_LEAST_S, AUTO_RATIO, LEAST_PIECE
from engine.scheduler.step_rates import StepRates
from engine.scheduler.step_time import (
    NUM_EARLY,
    QUICK_S,
    StepCoefficients,
    StepShape,
    StepTime,
    num_pairs,
    shape_of,
)

# Seconds of a step on three machines: one with a small model, a slow one, one like a GPU
MACHINES = {
    "small": StepCoefficients(9e-3, 5e-4, 2e-4, 2e-7, 1e-7),
    "slow": StepCoefficients(60e-3, 5e-3, 2e-3, 1e-6, 2e-6),
    "fast": StepCoefficients(4e-3, 1e-5, 1e-5, 1e-8, 1e-9),
}
OVERRUN = 1.25  # a step's true time over its target, once steps have been measured; without noise


def seconds_of(machine: StepCoefficients, shape: StepShape) -> float:
    return sum(c * x for c, x in zip(machine, (1, *shape), strict=True))


class World:
    """A scheduler whose steps take as long as a machine's, and sample token 7 only."""

    def __init__(
        self,
        machine: StepCoefficients,
        *,
        target_s: float | None = None,
        noise: random.Random | None = None,
    ) -> None:
        limits = SchedulerLimits(16, 256, 4096, target_step_s=target_s)
        blocks = BlockManager(4096, 16, prefix_caching=False)
        memory = MemoryBudget(4096 * 64, 64, blocks, AdapterSlots())
        self.scheduler = Scheduler(limits, memory)
        self.machine, self.noise, self.now = machine, noise, 0.0
        self.batches: list[ScheduledBatch] = []
        self._num_requests = 0

    def add(self, num_prompt: int, num_output: int) -> None:
        self._num_requests += 1
        sampling = SamplingParams(max_tokens=num_output)
        prompt = [1] * num_prompt
        self.scheduler.add(Request(f"r{self._num_requests}", prompt, sampling, self.now))

    def step(self) -> tuple[ScheduledBatch, float]:
        batch = self.scheduler.schedule(self.now)
        assert batch is not None
        seconds = seconds_of(self.machine, shape_of(batch))
        measured = seconds
        if self.noise is not None:
            measured *= self.noise.lognormvariate(0, 0.1)
            if self.noise.random() < 0.02:
                measured += 1.0  # the machine was busy with something else
        self.now += measured
        self.scheduler.update(batch, [[7] if r.samples else [] for r in batch.requests])
        self.scheduler.observe(batch, measured)
        self.batches.append(batch)
        return batch, seconds

    @property
    def num_prompts(self) -> int:
        """Requests that have no token yet."""
        running = [r for r in self.scheduler.running if r.num_remaining_tokens > 1]
        return len(running) + len(self.scheduler.waiting)

    def step_without_prompts(self, batch: ScheduledBatch) -> float:
        """Seconds that the rows of a batch that decode would take alone."""
        decodes = tuple(r for r in batch.requests if len(r.token_ids) == 1)
        return seconds_of(self.machine, shape_of(replace(batch, requests=decodes)))


def add_traffic(world: World, rng: random.Random, num_alive: int) -> None:
    while len(world.scheduler.running) + len(world.scheduler.waiting) < num_alive:
        world.add(rng.choice([5, 60, 128, 900]), rng.randint(1, 60))


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("target_s", [None, 0.15])
def test_steps_with_prompts_stay_within_the_target_while_anybody_decodes(
    machine: str, target_s: float | None
) -> None:
    rng = random.Random(f"{machine} {target_s}")
    world = World(MACHINES[machine], target_s=target_s, noise=rng)
    num_bounded = 0
    for number in range(400):
        add_traffic(world, rng, num_alive=1 + number // 25)
        num_prompts = world.num_prompts
        batch, seconds = world.step()
        shape = shape_of(batch)
        if number < 50 or not shape.pairs or len(batch.requests[0].token_ids) > 1:
            continue
        decode_s = world.step_without_prompts(batch)
        num_decodes = sum(len(r.token_ids) == 1 for r in batch.requests)
        crowd = 1 + num_prompts / num_decodes / 2
        target = target_s or max(AUTO_LEAST_S, AUTO_RATIO * decode_s * crowd)
        least = LEAST_PIECE * (world.machine.token + 1024 * world.machine.pair)
        assert seconds <= max(OVERRUN * target, OVERRUN * decode_s + 2 * least)
        num_bounded += batch.num_tokens < 256
    assert num_bounded > 20 or machine == "fast"


def test_the_oldest_prompt_advances_in_every_step() -> None:
    rng = random.Random(0)
    world = World(MACHINES["slow"], target_s=0.001, noise=rng)  # less than any step takes
    for _ in range(300):
        add_traffic(world, rng, num_alive=16)
        prompts = [r for r in world.scheduler.running if r.num_remaining_tokens > 1]
        oldest = prompts[0] if prompts else None
        before = oldest.num_remaining_tokens if oldest else 0
        batch, _ = world.step()
        if oldest is not None:
            piece = next(r for r in batch.requests if r.request_id == oldest.request_id)
            assert len(piece.token_ids) >= min(before, LEAST_PIECE)
            somebody_decodes = len(batch.requests[0].token_ids) == 1
            assert batch.num_tokens <= 16 + LEAST_PIECE or not somebody_decodes


def test_steps_may_be_longer_where_more_requests_wait_for_a_first_token_than_for_another() -> None:
    sizes: list[int] = []
    for num_waiting in (1, 4, 8, 64):
        world = World(MACHINES["slow"])
        world.add(64, 400)
        for _ in range(100):
            world.step()
        for _ in range(num_waiting):
            world.add(900, 1)
        sizes.append(world.step()[0].num_tokens)
    assert sizes[0] < sizes[1] < sizes[2] < sizes[3] == 256


def test_prompts_get_whole_steps_when_nobody_decodes() -> None:
    world = World(MACHINES["slow"], target_s=0.001)
    world.add(64, 2)
    while world.scheduler.has_unfinished:
        world.step()
    world.add(1000, 1)
    sizes: list[int] = []
    while world.scheduler.has_unfinished:
        sizes.append(world.step()[0].num_tokens)
    assert sizes == [256, 256, 256, 232]


def test_the_same_calls_with_the_same_times_give_the_same_batches() -> None:
    def run() -> list[ScheduledBatch]:
        rng = random.Random(3)
        world = World(MACHINES["small"], noise=rng)
        for _ in range(120):
            add_traffic(world, rng, num_alive=12)
            world.step()
        return world.batches

    assert run() == run()


def test_nothing_is_bounded_before_a_step_was_measured() -> None:
    world = World(MACHINES["slow"])
    for _ in range(2):
        world.add(300, 8)
    for expected in (256, 256):
        batch = world.scheduler.schedule(0.0)
        assert batch is not None and batch.num_tokens == expected
        world.scheduler.update(batch, [[7] if r.samples else [] for r in batch.requests])


@pytest.mark.parametrize("machine", MACHINES)
def test_times_are_learned_through_noise_and_outliers(machine: str) -> None:
    rng = random.Random(5)
    truth, cost = MACHINES[machine], StepTime()
    for number in range(600):
        shape = random_shape(rng, with_prompt=number % 100 > 60)
        seconds = seconds_of(truth, shape)
        if number > 200:
            assert 0.75 <= cost.predict(shape) / seconds <= 1.3
        cost.observe(shape, seconds * rng.lognormvariate(0, 0.1) * rng.choice([1] * 30 + [20]))


def test_a_machine_that_becomes_slower_is_followed() -> None:
    rng, cost, truth = random.Random(6), StepTime(), MACHINES["small"]
    slower = StepCoefficients(*(3 * c for c in truth))
    for machine in (truth, slower):
        for _ in range(200):
            shape = random_shape(rng, with_prompt=rng.random() < 0.5)
            cost.observe(shape, seconds_of(machine, shape))
        shape = random_shape(rng, with_prompt=True)
        assert cost.predict(shape) == pytest.approx(seconds_of(machine, shape), rel=0.1)


def test_quick_steps_are_learned_from_one_in_eight() -> None:
    rng, cost = random.Random(7), StepTime()
    quick = StepCoefficients(*(c / 30 for c in MACHINES["small"]))
    num_observed = 0
    for _ in range(NUM_EARLY + 8 * 200):
        shape = random_shape(rng, with_prompt=False)
        if cost.needs(seconds_of(quick, shape)):
            num_observed += 1
            cost.observe(shape, seconds_of(quick, shape))
    assert num_observed == NUM_EARLY + 200
    assert cost.predict(shape) == pytest.approx(seconds_of(quick, shape), rel=0.1)
    assert all(cost.needs(10 * QUICK_S) for _ in range(9))


@pytest.mark.parametrize("start", [0, 5, 4000])
@pytest.mark.parametrize("milliseconds", [-1, 0, 1, 30, 1000])
def test_a_piece_is_the_longest_that_fits(start: int, milliseconds: int) -> None:
    cost = StepTime()
    count, seconds = cost.piece_within(milliseconds / 1e3, start), milliseconds / 1e3

    def needs(tokens: int) -> float:
        pairs = tokens * start + tokens * (tokens + 1) / 2
        return tokens * cost.coefficients.token + pairs * cost.coefficients.pair

    assert needs(count) <= max(seconds, 0.0) * (1 + 1e-9)
    assert needs(count + 2) > seconds


def random_shape(rng: random.Random, *, with_prompt: bool) -> StepShape:
    num_decodes = rng.randint(1, 16)
    positions = sum(rng.randint(1, 2000) for _ in range(num_decodes))
    if not with_prompt:
        return StepShape(num_decodes, num_decodes, positions, 0)
    count, start = rng.randint(16, 112), rng.choice([0, 64, 1000])
    pairs = count * start + count * (count + 1) // 2
    return StepShape(num_decodes + count, num_decodes + 1, positions, pairs)


@pytest.mark.parametrize("machine", MACHINES)
def test_rates_are_those_of_the_steps(machine: str) -> None:
    world, rng = World(MACHINES[machine]), random.Random(1)
    assert world.scheduler.rates == StepRates()
    for _ in range(300):
        add_traffic(world, rng, 12)
        world.step()
    rates, running = world.scheduler.rates, world.scheduler.running
    times, num_running = MACHINES[machine], len(running)
    positions = sum(request.num_computed_tokens for request in running)
    rows = StepShape(num_running, num_running, positions)
    decode_s = seconds_of(times, rows)
    assert rates.step_s + num_running * rates.row_s == pytest.approx(decode_s, rel=0.1)
    full = StepShape(tokens=256, pairs=num_pairs(0, 256))
    assert rates.tokens_per_s == pytest.approx(256 / seconds_of(times, full), rel=0.1)


def test_adapters_that_requests_need_count_by_their_bytes_and_number() -> None:
    blocks = BlockManager(64, 16, prefix_caching=False)
    memory = MemoryBudget(64 * 1024, 1024, blocks, AdapterSlots(), max_adapters=4)
    scheduler = Scheduler(SchedulerLimits(16, 256, 512), memory)
    assert scheduler.adapters_used == 0
    for n, digest in enumerate(["", "x", "x", "y"]):
        scope = CacheScope(adapter_digest=digest)
        scheduler.add(Request(f"r{n}", [1], SamplingParams(max_tokens=1), 0.0, scope))
    assert scheduler.adapters_used == 2 / 4
    scheduler.adapters.set_ready("x", 64 * 1024)
    assert scheduler.adapters_used == pytest.approx(1.0, rel=0.01)
