"""Tests the scheduler on a device that detects wrong sharing, copies and evictions."""

from collections import deque
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.scheduler.adapter_slots import AdapterSlots
from engine.scheduler.batch import ScheduledBatch
from engine.scheduler.block_manager import BlockManager
from engine.scheduler.limits import SchedulerLimits
from engine.scheduler.memory import MemoryBudget
from engine.scheduler.request import (
    CacheScope,
    FinishReason,
    InvalidRequest,
    Request,
    SamplingParams,
)
from engine.scheduler.scheduler import Scheduler
from tests.engine.support.drafters import Seer, eager
from tests.engine.support.fake_device import (
    GARBAGE,
    DeviceError,
    FakeDevice,
    FakeStep,
    block_bytes,
    expected_output,
)

CERTAIN = "a grammar that leaves no choice of some tokens"
NEVER_TAKEN = [GARBAGE] * 6
NOT_SAMPLED = 10**6  # a token id that ends nothing
ADAPTERS = {"x": 900, "y": 1500, "z": 2600}  # bytes; a block of 4 tokens has 640
ALORAS = {"v": (1,), "w": (2, 0)}  # what switches them on
ALL_ADAPTERS = {**ADAPTERS, "v": 700, "w": 1000}


@dataclass
class World:
    """A scheduler, a device and the steps that are in flight between them."""

    scheduler: Scheduler
    device: FakeDevice
    now: float = 0.0
    in_flight: deque[FakeStep] = field(default_factory=deque[FakeStep])

    def step(self, *, is_lost: bool = False) -> list[Request]:
        """Launch a step if there is one, take due results; return the requests that ended."""
        num_kept = self.scheduler.pipeline_depth if self.launch(is_lost=is_lost) else 0
        ended: list[Request] = []
        while len(self.in_flight) > num_kept:
            ended += self.collect()
        return ended

    def launch(self, *, is_lost: bool = False) -> ScheduledBatch | None:
        self.now += 1.0
        batch = self.scheduler.schedule(self.now)
        if batch is not None:
            assert batch.num_tokens <= self.scheduler.limits.max_num_batched_tokens
            self.in_flight.append(self.device.launch(batch))
            self.in_flight[-1].is_lost = is_lost
        return batch

    def collect(self) -> list[Request]:
        step = self.in_flight.popleft()
        try:
            sampled = step.result()
        except DeviceError:
            return self.scheduler.fail(step.batch)
        self._add_certain(step.batch, sampled)
        progress = self.scheduler.update(step.batch, sampled)
        return [p.request for p in progress if p.request.finish_reason]

    def _add_certain(self, batch: ScheduledBatch, sampled: list[list[int]]) -> None:
        """Make tokens behind a sampled one certain. Grammars know of no stop token, no limit."""
        for scheduled, token_ids in zip(batch.requests, sampled, strict=True):
            request = self.scheduler.owner(scheduled)
            if request is None or request.sampling.grammar != CERTAIN or GARBAGE in token_ids:
                continue
            if token_ids and not scheduled.num_drafts:
                expected = [*expected_of(request), *NEVER_TAKEN]
                token_ids += expected[len(request.output_token_ids) + 1 :][: token_ids[0] % 6]

    def arrive(self) -> None:
        """Complete the oldest adapter copy in progress."""
        if self.device.arena.arriving:
            self.scheduler.adapters.set_resident(self.device.arena.arrive())

    def run(self, max_steps: int = 2000) -> list[Request]:
        finished: list[Request] = []
        while self.scheduler.has_unfinished or self.in_flight:
            finished += self.step()
            self.arrive()
            self.scheduler.check_integrity()
            max_steps -= 1
            assert max_steps, "requests never end"
        return finished


def make_world(
    *,
    num_blocks: int = 64,
    block_size: int = 4,
    max_num_seqs: int = 8,
    budget: int = 16,
    ready: bool = True,
    prefix_caching: bool = True,
    max_model_len: int | None = None,
    pipeline_depth: int = 0,
    loads_are_immediate: bool = True,
    drafts: bool = False,
) -> World:
    adapters = AdapterSlots(loads_are_immediate=loads_are_immediate)
    if ready:
        for digest, nbytes in ALL_ADAPTERS.items():
            adapters.set_ready(digest, nbytes, ALORAS.get(digest, ()))
    limits = SchedulerLimits(max_num_seqs, budget, max_model_len or num_blocks * block_size)
    blocks = BlockManager(num_blocks, block_size, prefix_caching=prefix_caching)
    memory_bytes = num_blocks * block_bytes(block_size)
    memory = MemoryBudget(memory_bytes, block_bytes(block_size), blocks, adapters)
    device = FakeDevice(block_size, memory_bytes, loads_are_immediate=loads_are_immediate)
    speculation = eager(Seer(expected_of), max_model_len=limits.max_model_len) if drafts else None
    scheduler = Scheduler(limits, memory, pipeline_depth=pipeline_depth, speculation=speculation)
    return World(scheduler, device)


def make_request(
    request_id: str,
    prompt: list[int],
    *,
    adapter_digest: str = "",
    seed: int = 0,
    max_tokens: int = 8,
    n: int = 1,
    stop: tuple[int, ...] = (),
    tenant: str = "",
    priority: int = 0,
    **sampling_changes: float | str | None,
) -> Request:
    sampling = SamplingParams(
        max_tokens=max_tokens,
        seed=seed,
        stop_token_ids=stop,
        **sampling_changes,  # type: ignore[arg-type]
    )
    scope = CacheScope(tenant=tenant, adapter_digest=adapter_digest)
    first, *forks = [
        Request(request_id, prompt, sampling, 0.0, scope=scope, priority=priority, index=i)
        for i in range(n)
    ]
    first.forks = forks
    return first


def expected_of(request: Request) -> list[int]:
    sampling = request.sampling
    return expected_output(
        request.adapter_digest,
        request.prompt_token_ids,
        sampling.seed + request.index,
        sampling.max_tokens,
        sampling.stop_token_ids,
        sampling.min_tokens,
        start_of(request),
    )


def start_of(request: Request) -> int:
    """Find where its adapter begins to act, by trying all places."""
    prompt, wanted = list(request.prompt_token_ids), ALORAS.get(request.adapter_digest)
    if wanted is None:
        return 0
    places = [i for i in range(len(prompt)) if prompt[i : i + len(wanted)] == list(wanted)]
    return max(places, default=10**6)


def assert_expected(request: Request) -> None:
    assert request.output_token_ids == expected_of(request)


class Traffic(RuleBasedStateMachine):
    """Adds, aborts, fails and finishes requests in memory too small for all of them."""

    pipeline_depth = 0
    loads_are_immediate = True
    drafts = False

    def __init__(self) -> None:
        super().__init__()
        self.world = make_world(
            num_blocks=13,
            max_num_seqs=4,
            budget=7,
            ready=False,
            pipeline_depth=self.pipeline_depth,
            loads_are_immediate=self.loads_are_immediate,
            drafts=self.drafts,
        )
        self.added: list[Request] = []
        self.ended: dict[Request, FinishReason] = {}

    @rule(
        common=st.integers(0, 16),
        tail=st.lists(st.integers(0, 1), min_size=1, max_size=6),
        adapter_digest=st.sampled_from(["", *ALL_ADAPTERS]),
        max_tokens=st.integers(1, 20),
        n=st.integers(1, 3),
        tenant=st.sampled_from(["s", "t"]),
        min_tokens=st.sampled_from([0, 0, 5]),
        penalty=st.sampled_from([0.0, 0.0, 0.5]),
        priority=st.sampled_from([0, 0, 1, -1]),
        grammar=st.sampled_from([None, CERTAIN]),
    )
    def add(
        self,
        common: int,
        tail: list[int],
        adapter_digest: str,
        max_tokens: int,
        n: int,
        tenant: str,
        min_tokens: int,
        penalty: float,
        priority: int,
        grammar: str | None,
    ) -> None:
        number = len(self.added)
        request = make_request(
            f"r{number}",
            [2] * common + tail,
            adapter_digest=adapter_digest,
            max_tokens=max_tokens,
            n=n,
            seed=number,
            stop=(3, 4, 5, 6),
            tenant=tenant,
            priority=priority,
            min_tokens=min(min_tokens, max_tokens),
            presence_penalty=penalty,
            grammar=grammar,
        )
        self._add(request)

    @precondition(lambda self: self.added)
    @rule(data=st.data(), num_resumed=st.integers(0, 3))
    def take_over(self, data: st.DataObject, num_resumed: int) -> None:
        """Abort a request; add another one of its id that resumes after some tokens."""
        old = data.draw(st.sampled_from(self.added))
        self._end(self.world.scheduler.abort(old.request_id))
        sampling = replace(old.sampling, seed=len(self.added))
        new = Request(old.request_id, old.prompt_token_ids, sampling, 0.0, scope=old.scope)
        whole = expected_of(new)
        new.output_token_ids = whole[: min(num_resumed, len(whole) - 1)]
        self._add(new)

    @rule(adapter=st.sampled_from(sorted(ALL_ADAPTERS)))
    def adapter_becomes_ready(self, adapter: str) -> None:
        invocation = ALORAS.get(adapter, ())
        self.world.scheduler.adapters.set_ready(adapter, ALL_ADAPTERS[adapter], invocation)
        self._end(self.world.scheduler.end_too_large(adapter))

    @rule(adapter=st.sampled_from(sorted(ALL_ADAPTERS)))
    def the_host_drops_an_adapter(self, adapter: str) -> None:
        self.world.scheduler.adapters.set_absent(adapter)

    @rule()
    def an_adapter_arrives(self) -> None:
        self.world.arrive()

    @rule(steps=st.integers(1, 5))
    def run(self, steps: int) -> None:
        for _ in range(steps):
            self._end(self.world.step())

    @precondition(lambda self: self.added)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.added))
        self._end(self.world.scheduler.abort(request.request_id))

    @precondition(lambda self: self.added)
    @rule(data=st.data())
    def abort_choice(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.added))
        ended = self.world.scheduler.abort(request.request_id, request.index)
        assert len(ended) <= 1 and all(r.key == request.key for r in ended)
        self._end(ended)

    @rule()
    def lose_a_step(self) -> None:
        self._end(self.world.step(is_lost=True))

    @invariant()
    def integrity(self) -> None:
        self.world.scheduler.check_integrity()

    def teardown(self) -> None:
        for adapter in ALL_ADAPTERS:
            self.adapter_becomes_ready(adapter)
        self._end(self.world.run())
        assert self.ended.keys() == set(self.added), "a request ended without an answer"
        assert self.world.scheduler.blocks.num_held == 0

    def _add(self, request: Request) -> None:
        scheduler = self.world.scheduler
        if scheduler.refusal(request):
            with pytest.raises(InvalidRequest, match="bytes of memory"):
                scheduler.add(request)
            return
        self.added += [request, *request.forks]
        scheduler.add(request)

    def _end(self, requests: list[Request]) -> None:
        for request in requests:
            assert request not in self.ended, "a request ended twice"
            assert request.finish_reason is not None
            self.ended[request] = request.finish_reason
            expected = expected_of(request)
            if request.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
                assert request.output_token_ids == expected
            else:
                assert request.output_token_ids == expected[: len(request.output_token_ids)]


class SlowLoads(Traffic):
    """Like Traffic, with loads that take any number of steps."""

    loads_are_immediate = False


class Drafted(Traffic):
    """Like Traffic, with guesses behind the tokens, some of which are wrong."""

    drafts = True


TestTraffic = Traffic.TestCase
TestDrafted = Drafted.TestCase
TestSlowLoads = SlowLoads.TestCase
TestTraffic.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestSlowLoads.settings = TestTraffic.settings
TestDrafted.settings = TestTraffic.settings


@pytest.mark.parametrize("budget", [3, 5, 16, 64])
@pytest.mark.parametrize("num_blocks", [11, 64])
def test_chunk_size_and_preemption_change_no_token(budget: int, num_blocks: int) -> None:
    world = make_world(num_blocks=num_blocks, budget=budget, max_num_seqs=3)
    for i in range(6):
        world.scheduler.add(make_request(str(i), list(range(10 + i)), max_tokens=12, seed=i))
    finished = world.run()
    assert len(finished) == 6
    for request in finished:
        assert_expected(request)
    assert (world.scheduler.num_preemptions > 0) == (num_blocks == 11)


def test_a_resident_adapter_overtakes_one_that_is_loading() -> None:
    world = make_world(ready=False)
    world.scheduler.adapters.set_ready("y", ADAPTERS["y"])
    world.scheduler.add(make_request("slow", [1, 2, 3], adapter_digest="x"))
    world.scheduler.add(make_request("fast", [1, 2, 3], adapter_digest="y", max_tokens=2))
    world.step()
    assert [r.request_id for r in world.step()] == ["fast"]
    world.scheduler.adapters.set_ready("x", ADAPTERS["x"])
    assert [r.request_id for r in world.run()] == ["slow"]


@pytest.mark.parametrize("loads_are_immediate", [True, False])
def test_a_large_adapter_is_not_starved_by_small_ones_that_keep_coming(
    loads_are_immediate: bool,
) -> None:
    """The large adapter does not fit together with the small one."""
    world = make_world(num_blocks=6, loads_are_immediate=loads_are_immediate)
    world.scheduler.add(make_request("small-0", [1], adapter_digest="x", max_tokens=4))
    world.step()
    world.scheduler.add(make_request("large", [1], adapter_digest="z", max_tokens=1))
    done: list[str] = []
    for i in range(1, 12):
        world.scheduler.add(make_request(f"small-{i}", [1], adapter_digest="x", max_tokens=4))
        done += [r.request_id for r in world.step()]
        world.arrive()
    assert "large" in done


def test_while_an_adapter_is_copied_its_request_waits_and_others_run() -> None:
    world = make_world(loads_are_immediate=False)
    world.scheduler.add(make_request("slow", [1, 2, 3], adapter_digest="x"))
    world.scheduler.add(make_request("fast", [1, 2, 3], max_tokens=3))
    finished = [r.request_id for _ in range(4) for r in world.step()]
    assert finished == ["fast"] and len(world.device.arena.arriving) == 1
    assert world.scheduler.schedule(9.0) is None
    assert [r.request_id for r in world.run()] == ["slow"]


def test_a_batch_may_consist_of_a_copy_alone() -> None:
    world = make_world(loads_are_immediate=False)
    world.scheduler.add(make_request("r", [1, 2, 3], adapter_digest="x"))
    batch = world.scheduler.schedule(1.0)
    assert batch is not None and not batch.requests
    (load,) = batch.adapter_loads
    assert (load.digest, load.nbytes) == ("x", ADAPTERS["x"])


@pytest.mark.parametrize("num_tokens", [12, 13])
def test_overtaking_requests_leave_the_blocks_that_will_be_wanted(num_tokens: int) -> None:
    world = make_world(num_blocks=13, loads_are_immediate=False)  # 11 besides the adapter
    world.scheduler.add(make_request("slow", list(range(32)), adapter_digest="x"))
    world.scheduler.add(make_request("other", list(range(num_tokens)), max_tokens=1))
    assert bool(world.step()) == (num_tokens == 12)


def test_no_request_overtakes_one_whose_adapter_has_to_be_copied_again() -> None:
    world = make_world(loads_are_immediate=False)
    world.scheduler.add(make_request("slow", [1, 2, 3], adapter_digest="x"))
    world.step()
    world.arrive()
    world.scheduler.memory.discard("x")
    world.scheduler.add(make_request("late", [1, 2, 3], max_tokens=1))
    assert not world.step() and not world.step()
    world.arrive()
    assert [r.request_id for r in world.step()] == ["late"]
    assert [r.request_id for r in world.scheduler.running] == ["slow"]


def test_requests_are_computed_again_if_a_step_with_moves_failed() -> None:
    world = make_world(num_blocks=13, max_num_seqs=2)
    for first, request_id in enumerate(("low", "high")):
        prompt = list(range(first, first + 20))
        world.scheduler.add(make_request(request_id, prompt, max_tokens=1))
    world.run()
    assert world.scheduler.blocks.num_cached == 10
    world.scheduler.add(make_request("lost", [1], adapter_digest="z"))
    batch = world.launch(is_lost=True)
    assert batch is not None and batch.moves
    assert [r.request_id for r in world.collect()] == ["lost"]
    for first, request_id in enumerate(("low", "high")):
        prompt = list(range(first, first + 20))
        world.scheduler.add(make_request(request_id, prompt, max_tokens=1))
    assert len(world.run()) == 2


def test_a_request_that_never_fits_is_refused_with_the_bytes() -> None:
    world = make_world(num_blocks=13)
    world.scheduler.add(make_request("fits", [1] * 4, adapter_digest="z", max_tokens=29))
    with pytest.raises(
        InvalidRequest, match=f"33 tokens .* need {9 * 640 + 2816} .*are {13 * 640}"
    ):
        world.scheduler.add(make_request("never", [1] * 4, adapter_digest="z", max_tokens=30))
    assert [r.request_id for r in world.run()] == ["fits"]


def test_choices_share_the_prompt_and_copy_only_what_they_write() -> None:
    world = make_world(prefix_caching=False)
    prompt = list(range(14))
    world.scheduler.add(make_request("r", prompt, n=4, max_tokens=3))
    world.step()
    world.step()
    tables = [r.block_table for r in world.scheduler.running]
    assert len(tables) == 4
    assert all(t[:3] == tables[0][:3] for t in tables)
    assert len({t[3] for t in tables}) == 4
    finished = world.run()
    assert len(finished) == 4
    for request in finished:
        assert_expected(request)


def test_a_repeated_prompt_is_taken_from_the_cache_but_for_its_last_tokens() -> None:
    world = make_world()
    prompt = list(range(12))
    world.scheduler.add(make_request("a", prompt))
    world.run()
    world.scheduler.add(make_request("b", prompt))
    (second,) = world.run()
    assert second.num_cached_tokens == 8
    assert_expected(second)


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("max_num_seqs", [2, 8])
def test_choices_do_not_count_each_others_prompt_as_cached(n: int, max_num_seqs: int) -> None:
    world = make_world(max_num_seqs=max_num_seqs)
    prompt = list(range(12))
    world.scheduler.add(make_request("cold", prompt, n=n))
    assert [r.num_cached_tokens for r in world.run()] == [0] * n
    world.scheduler.add(make_request("warm", prompt, n=n))
    assert [r.num_cached_tokens for r in world.run()] == [8] * n


def test_what_is_cached_after_a_preemption_does_not_count() -> None:
    world = make_world(num_blocks=11, max_num_seqs=3)
    for i in range(6):
        world.scheduler.add(
            make_request(str(i), list(range(i, 10 + i)), max_tokens=12, n=1 + i % 2)
        )
    finished = world.run()
    assert world.scheduler.num_preemptions
    assert [r.num_cached_tokens for r in finished] == [0] * 9


def test_a_resumed_request_never_counts_its_own_tokens_as_cached() -> None:
    world = make_world()
    first = make_request("a", list(range(6)), max_tokens=20)
    world.scheduler.add(first)
    world.run()
    again = make_request("b", list(range(6)), max_tokens=20)
    again.output_token_ids = first.output_token_ids[:15]
    world.scheduler.add(again)
    world.run()
    assert again.num_cached_tokens == 6
    assert_expected(again)


def test_a_choice_can_be_aborted_at_any_time() -> None:
    for num_steps in range(5):
        for index in range(3):
            world = make_world(budget=4, max_num_seqs=2)
            world.scheduler.add(make_request("r", list(range(9)), adapter_digest="x", n=3))
            for _ in range(num_steps):
                world.step()
            ended = world.scheduler.abort("r", index)
            assert [(r.index, r.finish_reason) for r in ended] == [(index, FinishReason.ABORT)]
            assert world.scheduler.abort("r", index) == []
            world.scheduler.check_integrity()
            finished = world.run()
            assert sorted(r.index for r in finished) == sorted({0, 1, 2} - {index})
            for request in finished:
                assert_expected(request)
            assert world.scheduler.blocks.num_held == 0


@pytest.mark.parametrize(
    ("adapter", "tenant"), [("x", ""), ("", "other")], ids=["adapter", "tenant"]
)
def test_cached_blocks_are_not_shared_between_adapters_or_tenants(
    adapter: str, tenant: str
) -> None:
    world = make_world()
    prompt = list(range(12))
    world.scheduler.add(make_request("a", prompt))
    world.run()
    world.scheduler.add(make_request("b", prompt, adapter_digest=adapter, tenant=tenant))
    (second,) = world.run()
    assert second.num_cached_tokens == 0


def test_abort_frees_blocks_and_pins_at_once() -> None:
    world = make_world()
    world.scheduler.add(make_request("r", list(range(9)), adapter_digest="x", n=2))
    world.step()
    assert world.scheduler.blocks.num_held
    assert len(world.scheduler.abort("r")) == 2
    assert world.scheduler.blocks.num_held == 0
    world.scheduler.check_integrity()


def test_decodes_go_on_while_a_long_prompt_is_computed_in_chunks() -> None:
    world = make_world(budget=8)
    world.scheduler.add(make_request("short", [1], max_tokens=10))
    world.step()
    world.scheduler.add(make_request("long", list(range(40)), max_tokens=1))
    (short,) = world.scheduler.running
    for i in range(2, 6):
        world.step()
        assert len(short.output_token_ids) == i


def test_a_resumed_request_continues_where_it_stopped() -> None:
    world = make_world()
    whole = expected_output("", [5, 6, 7], 9, 8)
    request = make_request("r", [5, 6, 7], seed=9)
    request.output_token_ids = whole[:5]
    world.scheduler.add(request)
    (finished,) = world.run()
    assert finished.output_token_ids == whole


# ---- grammars ----


def test_a_request_whose_grammar_is_compiled_is_passed_over_until_it_is_ready() -> None:
    world = make_world()
    held = make_request("held", [1, 2, 3], max_tokens=2, grammar="g")
    held.awaits_grammar = True
    other = make_request("other", [4, 5], max_tokens=2)
    world.scheduler.add(held)
    world.scheduler.add(other)
    batch = world.launch()
    assert batch is not None and [r.request_id for r in batch.requests] == ["other"]
    assert batch.grammar_rows == ()
    world.collect()
    world.scheduler.set_grammar_ready("another")
    assert held.awaits_grammar
    world.scheduler.set_grammar_ready("g")
    batch = world.launch()
    assert batch is not None and [r.request_id for r in batch.requests] == ["other", "held"]
    assert batch.grammar_rows == (1,)


@pytest.mark.parametrize(
    ("waits_for", "is_blocked"), [("", False), ("awaits_proof", False), ("awaits_grammar", True)]
)
def test_steps_are_taken_together_only_if_a_step_would_admit_nobody(
    waits_for: str, is_blocked: bool
) -> None:
    world = make_world()
    world.scheduler.add(make_request("first", [1, 2, 3]))
    world.step()
    second = make_request("second", [4, 5], adapter_digest="x")
    if waits_for:
        setattr(second, waits_for, True)
    world.scheduler.add(second)
    assert (world.scheduler.begin_run(NOT_SAMPLED) is not None) == is_blocked
    if not is_blocked:
        assert lengths(world.launch()) == {"first": 1, "second": 2}


def test_requests_of_a_grammar_that_is_refused_end_and_others_stay() -> None:
    world = make_world()
    requests = [make_request(name, [1, 2], max_tokens=2, grammar=name[0]) for name in ("a1", "b1")]
    for request in requests:
        request.awaits_grammar = True
        world.scheduler.add(request)
    assert world.scheduler.end_grammar_with_error("a") == [requests[0]]
    assert requests[0].finish_reason == FinishReason.ERROR
    world.scheduler.set_grammar_ready("b")
    assert world.run() == [requests[1]]


# ---- priorities ----


@pytest.mark.parametrize(
    ("queued", "order"),
    [
        ("s0 s0 t0", "s0 t0 s0"),
        ("s0 s1 s0 s-1", "s-1 s0 s0 s1"),
        ("s2 t0 s1 t-1 s1", "s1 t-1 s1 t0 s2"),  # nobody's priority delays another tenant
        ("t0 t0 s-9", "t0 s-9 t0"),
    ],
)
def test_priorities_order_the_requests_of_a_tenant(queued: str, order: str) -> None:
    world = make_world(max_num_seqs=1)
    for at, name in enumerate(queued.split()):
        request = make_request(f"{name} {at}", [1], tenant=name[0], priority=int(name[1:]))
        world.scheduler.add(request)
    ended = [request.request_id.split() for request in world.run()]
    assert " ".join(name for name, _ in ended) == order
    for name in set(queued.split()):
        numbers = [int(number) for other, number in ended if other == name]
        assert numbers == sorted(numbers), "equal ones go in the order in which they came"


def lengths(batch: ScheduledBatch | None) -> dict[str, int]:
    return {r.request_id: len(r.token_ids) for r in batch.requests} if batch else {}


def add_certain(world: World, request: Request, num: int) -> None:
    """Let the next step make so many tokens certain behind the one that it samples."""
    batch = world.scheduler.schedule(0.0)
    assert batch is not None
    done = len(request.output_token_ids)
    sampled = world.device.launch(batch).result()
    at = [r.request_id for r in batch.requests].index(request.request_id)
    expected = expected_of(request)
    assert sampled[at] == [expected[done]]
    sampled[at] = expected[done : done + 1 + num]
    world.scheduler.update(batch, sampled)


@pytest.mark.parametrize("pipeline_depth", [0, 1])
def test_tokens_that_are_certain_are_computed_at_once(pipeline_depth: int) -> None:
    world = make_world(budget=8, pipeline_depth=pipeline_depth)
    request = make_request("r", [1, 2], max_tokens=30, grammar=CERTAIN)
    world.scheduler.add(request)
    add_certain(world, request, 10)
    assert lengths(world.launch()) == {"r": 8}
    world.collect()
    assert len(request.output_token_ids) == 11
    batch = world.launch()
    assert lengths(batch) == {"r": 3} and batch is not None and batch.grammar_rows == (0,)
    world.collect()
    assert len(request.output_token_ids) >= 12
    assert world.run() == [request]
    assert_expected(request)


def test_tokens_that_are_certain_hold_up_nobody() -> None:
    """Beside prompts they take half of what decodes leave."""
    world = make_world(budget=8)
    request = make_request("r", [1, 2], max_tokens=30, grammar=CERTAIN)
    world.scheduler.add(request)
    add_certain(world, request, 20)
    world.scheduler.add(make_request("long", list(range(12)), max_tokens=3))
    assert lengths(world.launch()) == {"r": 4, "long": 4}
    world.collect()
    assert lengths(world.launch()) == {"r": 4, "long": 4}
    world.collect()
    world.scheduler.add(make_request("new", [5, 6, 7], max_tokens=1))
    assert lengths(world.launch()) == {"r": 4, "long": 4}
    world.collect()
    assert lengths(world.launch()) == {"long": 1, "r": 4, "new": 3}
    world.collect()
    for finished in world.run():
        assert_expected(finished)


def test_tokens_that_are_certain_preempt_nobody() -> None:
    world = make_world(num_blocks=8, budget=32, prefix_caching=False)
    request = make_request("r", [1, 2], max_tokens=26, grammar=CERTAIN)
    world.scheduler.add(request)
    world.scheduler.add(make_request("other", list(range(20)), max_tokens=3))
    add_certain(world, request, 20)
    assert lengths(world.launch()) == {"r": 1, "other": 1}
    world.collect()
    assert world.scheduler.num_preemptions == 0
