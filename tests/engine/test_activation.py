"""Tests where an activated LoRA begins to act, and which KV blocks it shares with the base."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.scheduler.activation import NEVER, adapter_start
from engine.scheduler.block_manager import BlockManager
from engine.scheduler.prefix_cache import publish_blocks
from engine.scheduler.request import CacheScope, Request, SamplingParams
from tests.engine.test_scheduler import assert_expected, make_request, make_world

BLOCK = 3
TOKENS = st.lists(st.integers(0, 1), max_size=12)


@given(prompt=TOKENS, invocation=st.lists(st.integers(0, 1), min_size=1, max_size=5))
def test_the_start_is_the_last_place_in_the_prompt(
    prompt: list[int], invocation: list[int]
) -> None:
    length = len(invocation)
    places = [i for i in range(len(prompt)) if prompt[i : i + length] == invocation]
    assert adapter_start(prompt, invocation) == (places[-1] if places else NEVER)


def test_an_adapter_without_invocation_acts_from_the_beginning() -> None:
    assert adapter_start([5, 6], []) == 0


REQUESTS = st.tuples(
    st.sampled_from(["s", "t"]),
    st.sampled_from(["", "x", "y"]),
    st.sampled_from([[0] * 3, [0] * 7, [0, 0, 0, 0, 1, 0]]),
    st.sampled_from([0, 1, 3, 4, NEVER]),
)


@given(st.lists(REQUESTS, min_size=2, max_size=12))
def test_blocks_have_equal_hashes_exactly_if_their_kv_is_equal(
    drawn: list[tuple[str, str, list[int], int]],
) -> None:
    """KV is equal if all tokens up to the block's end are, each with its adapter, in one tenant."""
    kv_of: dict[bytes, object] = {}
    for tenant, digest, tokens, position in drawn:
        start = position if digest else NEVER
        scope = CacheScope(tenant, adapter_digest=digest)
        request = Request("r", tokens, SamplingParams(), 0.0, scope=scope, adapter_start=start)
        blocks = BlockManager(4, BLOCK)
        blocks.grow(request.block_table, len(tokens))
        publish_blocks(blocks, request, len(tokens))
        owners = [digest if i >= start else "" for i in range(len(tokens))]
        for i, block_hash in enumerate(request.block_hashes, 1):
            end = i * BLOCK
            kv = (tenant, tuple(zip(tokens[:end], owners[:end], strict=True)))
            assert kv_of.setdefault(block_hash, kv) == kv
    assert len(set(map(str, kv_of.values()))) == len(kv_of), "equal KV has two hashes"


CONTEXT = [7] * 18
INVOKED = {"": CONTEXT, "v": [*CONTEXT, 1, 5], "w": [*CONTEXT, 2, 0, 5]}


@pytest.mark.parametrize(("first", "second"), [*product(INVOKED, INVOKED)])
def test_the_base_and_all_activated_adapters_share_what_is_before_them(
    first: str, second: str
) -> None:
    world = make_world(budget=64)
    for number, digest in enumerate((first, second)):
        request = make_request(f"r{number}", INVOKED[digest], adapter_digest=digest)
        world.scheduler.add(request)
        assert world.run() == [request]
        assert_expected(request)
    shared = 20 if first == second == "w" else 16  # its fifth block is full, with its own rows
    assert request.num_cached_tokens == shared


def test_a_generated_invocation_does_not_move_the_start_whatever_replays_it() -> None:
    """A resumed request has generated tokens beside its prompt; they are not searched."""
    request = make_request("r", [7, 1, 7, 7], adapter_digest="v", max_tokens=9)
    request.output_token_ids = [5, 1, 6]
    world = make_world(budget=64)
    world.scheduler.add(request)
    batch = world.launch()
    assert batch is not None
    assert [slot > 0 for slot in batch.requests[0].row_slots] == [False] + [True] * 6


def test_what_is_before_the_invocation_is_found_by_the_same_tenant_alone() -> None:
    world = make_world(budget=64)
    for number, tenant in enumerate(("s", "t")):
        request = make_request(f"r{number}", INVOKED["v"], adapter_digest="v", tenant=tenant)
        world.scheduler.add(request)
        world.run()
        assert request.num_cached_tokens == 0
