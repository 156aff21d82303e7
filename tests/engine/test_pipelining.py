"""Tests scheduling one step ahead: no token changes, every request is answered once."""

from typing import Any

import pytest
from hypothesis import settings

from engine.scheduler.batch import PENDING, ScheduledBatch
from engine.scheduler.request import FinishReason
from tests.engine.support.fake_device import expected_output
from tests.engine.test_scheduler import (
    Traffic,
    World,
    assert_expected,
    expected_of,
    make_request,
    make_world,
)


class PipelinedTraffic(Traffic):
    pipeline_depth = 1


class PipelinedSlowLoads(PipelinedTraffic):
    loads_are_immediate = False


TestTraffic = PipelinedTraffic.TestCase
TestSlowLoads = PipelinedSlowLoads.TestCase
TestTraffic.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestSlowLoads.settings = TestTraffic.settings


def ahead(**changes: Any) -> World:
    return make_world(pipeline_depth=1, **changes)


def inputs(batch: ScheduledBatch | None) -> dict[str, tuple[int, list[int]]]:
    """Return (start, token_ids) by request id."""
    return {r.request_id: (r.start, r.token_ids) for r in batch.requests} if batch else {}


def test_a_step_continues_with_a_token_that_is_still_being_sampled() -> None:
    world = ahead(budget=8, block_size=4)
    world.scheduler.add(make_request("r", list(range(12)), max_tokens=4))
    assert inputs(world.launch()) == {"r": (0, list(range(8)))}
    assert inputs(world.launch()) == {"r": (8, [8, 9, 10, 11])}
    world.collect()
    batch = world.launch()
    assert inputs(batch) == {"r": (12, [PENDING])}
    assert batch is not None and len(batch.requests[0].block_table) == 4
    world.collect()
    (request,) = world.run()
    assert_expected(request)


@pytest.mark.parametrize(("max_tokens", "max_model_len"), [(3, 40), (30, 8)])
def test_nothing_is_computed_past_a_certain_end(max_tokens: int, max_model_len: int) -> None:
    world = ahead(max_model_len=max_model_len)
    world.scheduler.add(make_request("r", [1, 2, 3, 4, 5], max_tokens=max_tokens))
    launched = [world.launch(), world.launch()]
    world.collect()
    launched.append(world.launch())
    world.collect()
    assert [len(inputs(batch)) for batch in launched] == [1, 1, 1]
    assert world.launch() is None
    (request,) = world.collect()
    assert request.finish_reason is FinishReason.LENGTH
    assert request.output_token_ids == expected_of(request)[:3]


def test_a_stop_token_ends_a_request_whose_next_step_is_under_way() -> None:
    world = ahead()
    stop = expected_output("", [1, 2, 3], 0, 4)[-1]
    request = make_request("r", [1, 2, 3], stop=(stop,), max_tokens=20)
    world.scheduler.add(request)
    ended = [r for _ in range(5) for r in world.step()]
    assert ended == [request] and request.finish_reason is FinishReason.STOP
    assert len(world.in_flight) == 1 and world.scheduler.blocks.num_held == 0
    assert world.run() == []
    assert_expected(request)


def test_blocks_that_only_a_step_in_flight_fills_are_not_in_the_prefix_cache() -> None:
    world = ahead(block_size=4, budget=4)
    world.scheduler.add(make_request("r", list(range(12))))
    world.launch()
    world.launch()
    assert world.scheduler.blocks.find(world.scheduler.running[0].block_hashes) == []
    world.collect()
    (request,) = world.scheduler.running
    assert request.num_computed_tokens == 8
    assert request.num_published_blocks == 1
    world.scheduler.abort("r")
    assert world.scheduler.blocks.num_cached == 1


def test_a_row_in_flight_is_dropped_if_another_request_has_taken_its_id() -> None:
    world = ahead()
    world.scheduler.add(make_request("r", [1, 2, 3], seed=1))
    world.launch()
    world.launch()
    world.scheduler.abort("r")
    second = make_request("r", [4, 5], seed=2)
    world.scheduler.add(second)
    world.collect()
    world.launch()
    world.collect()
    assert second.output_token_ids == []
    assert world.run() == [second]
    assert_expected(second)


def test_a_request_preempted_in_flight_samples_its_pending_token_again() -> None:
    world = ahead(num_blocks=4, block_size=4, max_num_seqs=2, max_model_len=16, budget=32)
    old, young = make_request("old", [1] * 7, seed=1), make_request("young", [2] * 7, seed=2)
    world.scheduler.add(old)
    world.scheduler.add(young)
    while not world.scheduler.num_preemptions:
        world.launch()
        if len(world.in_flight) > 1:
            known = len(young.output_token_ids)
            world.collect()
    assert young.num_pending_tokens == 0 and len(young.output_token_ids) == known
    world.scheduler.check_integrity()
    assert {r.request_id for r in world.run()} == {"old", "young"}
    assert_expected(old)
    assert_expected(young)


def test_a_request_that_is_preempted_by_its_own_need_keeps_its_pending_token() -> None:
    world = ahead(num_blocks=4, block_size=4, max_num_seqs=2, max_model_len=16, budget=32)
    old, young = make_request("old", [1] * 4, seed=1), make_request("young", [2] * 7, seed=2)
    world.scheduler.add(old)
    world.scheduler.add(young)
    while not world.scheduler.num_preemptions:
        world.step()
    assert len(young.output_token_ids) == 2
    assert {r.request_id for r in world.run()} == {"old", "young"}
    assert_expected(old)
    assert_expected(young)


def test_blocks_of_a_request_that_is_about_to_end_are_waited_for() -> None:
    world = ahead(num_blocks=4, block_size=4, max_num_seqs=2, max_model_len=16)
    world.scheduler.add(make_request("long", [1] * 7, max_tokens=9))
    world.scheduler.add(make_request("short", [2] * 7, max_tokens=2))
    assert {r.request_id for r in world.run()} == {"long", "short"}
    assert world.scheduler.num_preemptions == 0


def test_min_tokens_counts_the_pending_token() -> None:
    world = ahead()
    sampling = {"min_tokens": 3, "presence_penalty": 0.5}
    world.scheduler.add(make_request("r", [1, 2], stop=(3,), max_tokens=6, **sampling))
    forbidden: list[tuple[int, ...]] = []
    for _ in range(4):
        batch = world.launch()
        assert batch is not None
        forbidden.append(tuple(batch.requests[0].forbidden_token_ids))
        while len(world.in_flight) > 1:
            world.collect()
    assert forbidden == [(3,), (3,), (), ()]
    (request,) = world.run()
    assert_expected(request)


def test_a_failed_step_ends_only_its_own_requests() -> None:
    world = ahead(budget=8)
    lost = [make_request(f"lost-{i}", [i, 7], max_tokens=9) for i in range(2)]
    for request in lost:
        world.scheduler.add(request)
    world.launch(is_lost=True)
    kept = make_request("kept", [1, 2, 3], n=2)
    world.scheduler.add(kept)
    batch = world.launch()
    assert inputs(batch) == {
        "lost-0": (2, [PENDING]),
        "lost-1": (2, [PENDING]),
        "kept": (0, [1, 2, 3]),
    }
    assert world.collect() == lost
    world.scheduler.check_integrity()
    for request in world.run():
        assert request.request_id == "kept"
        assert_expected(request)


def test_an_adapter_that_a_lost_step_was_to_load_is_loaded_again_for_later_requests() -> None:
    world = ahead()
    world.scheduler.add(make_request("lost", [1, 2], adapter_digest="x"))
    world.launch(is_lost=True)
    later = make_request("later", [1, 2, 3], adapter_digest="x")
    world.scheduler.add(later)
    world.launch()
    assert [r.request_id for r in world.collect()] == ["lost"]
    world.scheduler.check_integrity()
    assert world.scheduler.adapters.resident == ()
    assert world.run() == [later]
    assert_expected(later)


def test_choices_start_once_the_prompt_has_certainly_been_computed() -> None:
    world = ahead(prefix_caching=False, budget=4)
    world.scheduler.add(make_request("r", list(range(6)), n=3, max_tokens=5))
    world.launch()
    world.launch()
    world.collect()
    assert len(world.scheduler.running) == 1
    world.launch()
    world.collect()
    assert len(world.scheduler.running) == 3
    tables = [r.block_table for r in world.scheduler.running]
    assert tables[0][:2] == tables[1] == tables[2]
    finished = world.run()
    assert len(finished) == 3
    for request in finished:
        assert_expected(request)


def test_a_request_leaves_the_queue_when_it_is_first_scheduled() -> None:
    world = ahead()
    request = make_request("r", [1], max_tokens=3)
    world.scheduler.add(request)
    world.launch()
    world.launch()
    world.now = 50.0
    world.collect()
    assert request.first_scheduled_s == 1.0


@pytest.mark.parametrize("num_blocks", [11, 64])
@pytest.mark.parametrize("max_num_seqs", [1, 3])
def test_too_few_blocks_and_places_change_no_token(num_blocks: int, max_num_seqs: int) -> None:
    world = ahead(num_blocks=num_blocks, max_num_seqs=max_num_seqs)
    for i in range(6):
        world.scheduler.add(make_request(str(i), list(range(10 + i)), max_tokens=12, seed=i))
    finished = world.run()
    assert len(finished) == 6
    for request in finished:
        assert_expected(request)


def test_no_more_than_the_depth_may_be_scheduled_ahead() -> None:
    world = ahead()
    world.scheduler.add(make_request("r", [1, 2, 3]))
    world.launch()
    world.launch()
    with pytest.raises(AssertionError, match="an update or fail is due"):
        world.launch()
    world = make_world()
    world.scheduler.add(make_request("r", [1, 2, 3]))
    world.launch()
    with pytest.raises(AssertionError, match="an update or fail is due"):
        world.launch()


def test_a_row_with_a_grammar_waits_for_its_token_and_others_do_not() -> None:
    world = ahead()
    world.scheduler.add(make_request("held", [1, 2], max_tokens=4, grammar="g"))
    world.scheduler.add(make_request("free", [3, 4], max_tokens=4))
    assert set(inputs(world.launch())) == {"held", "free"}
    assert inputs(world.launch()) == {"free": (2, [PENDING])}
    world.collect()
    batch = world.launch()
    (held,) = [r for r in world.scheduler.running if r.request_id == "held"]
    assert inputs(batch)["held"] == (2, held.output_token_ids)
    world.collect()
    for request in world.run():
        assert_expected(request)
