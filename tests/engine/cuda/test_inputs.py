"""Tests the contents of a step's buffers, and that copies use no memory too early."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.backends.cuda import adapter_copies
from engine.backends.cuda.adapter_copies import AdapterCopies, PackedAdapter, pack_adapter
from engine.backends.cuda.extent import AdapterExtent, extent_nbytes, pack_extent
from engine.backends.cuda.inputs import (
    NO_SLOT,
    InputBuffers,
    StepNumbers,
    StepShape,
    request_key,
)
from engine.backends.cuda.packed_copies import Download, Upload
from engine.backends.cuda.positions import PositionsCapacity, exact_capacity
from engine.backends.cuda.streams import Device, HostDevice
from engine.scheduler.batch import (
    PENDING,
    AdapterLoad,
    AdapterMove,
    BlockCopy,
    ScheduledBatch,
    ScheduledRequest,
)
from engine.scheduler.request import SamplingParams
from tests.engine.cuda.test_extent import make_weights
from tests.engine.support.lagging_device import LaggingDevice

BLOCK_SIZE = 4


def request_of(
    name: int, token_ids: list[int], start: int = 0, table: tuple[int, ...] | None = None
) -> ScheduledRequest:
    end = start + len(token_ids)
    table = table or tuple(range(10 * name, 10 * name + -(-end // BLOCK_SIZE)))
    return ScheduledRequest(str(name), 0, token_ids, start, table, 0, SamplingParams(), True)


def make_buffers(device: Device | None = None) -> InputBuffers:
    return InputBuffers(
        device or HostDevice(), max_samples=5, max_rows=40, max_words=4096, block_size=BLOCK_SIZE
    )


def decode_shape(size: int, lora_words: int = 0) -> StepShape:
    return StepShape(size, size, size, PositionsCapacity(size, 0, 6, 0, 16), lora_words)


def numbers_of(
    output_rows: list[int] | None = None,
    sampled_before: dict[tuple[str, int, int], int] | None = None,
    lora_words: list[int] | None = None,
) -> StepNumbers:
    rows = output_rows or []
    words = np.array(lora_words or [], np.int32)
    return StepNumbers(rows, rows, sampled_before or {}, words, words[:0])


@pytest.mark.parametrize("fill", [InputBuffers.fill, InputBuffers.fill_decodes])
def test_padding_rows_of_a_decode_batch_do_no_harm(fill: Any) -> None:
    buffers, shape = make_buffers(), decode_shape(4, lora_words=3)
    inputs = buffers.views(shape, 24)
    for tensor in (inputs.token_ids, inputs.slot_mapping, inputs.attention.context_lens):
        tensor.fill_(77)
    requests = [request_of(1, [5], start=9), request_of(2, [6])]
    fill(buffers, shape, requests, numbers_of([0, 1], lora_words=[8, 9]))
    buffers.resolve(inputs)
    assert inputs.token_ids.tolist() == [5, 6, 0, 0]
    assert inputs.positions.tolist() == [9, 0, 0, 0]
    assert inputs.slot_mapping.tolist() == [12 * BLOCK_SIZE + 1, 20 * BLOCK_SIZE, NO_SLOT, NO_SLOT]
    assert inputs.attention.context_lens.tolist() == [10, 1, 0, 0]
    assert inputs.attention.cu_seqlens_q.tolist() == [0, 1, 2, 3, 4]
    assert inputs.attention.block_tables[0, :3].tolist() == [10, 11, 12]
    assert inputs.output_rows.tolist() == [0, 1, 0, 0]
    assert inputs.lora_words.tolist() == [8, 9, 0]


def test_tables_of_other_requests_replace_those_of_the_last_step() -> None:
    """Unchanged pinned memory is not copied again, but must never be stale."""
    buffers, dice = make_buffers(), random.Random(3)
    shapes = {size: decode_shape(size) for size in (4, 5)}
    tables = [tuple(dice.sample(range(100), 6)) for _ in range(4)]
    mixed = [request_of(1, [6, 7, 8])]
    for step in range(60):
        if dice.random() < 0.2:
            exact = StepShape(3, 1, 1, exact_capacity(mixed, 16))
            none = numbers_of([0])
            buffers.fill(exact, mixed, none)
        size = dice.choice((4, 5))
        chosen = [
            tuple(dice.choice(tables)[: dice.randint(1, 6)]) for _ in range(dice.randint(1, 4))
        ]
        requests = [
            request_of(i, [step], BLOCK_SIZE * len(table) - 1, table)
            for i, table in enumerate(chosen)
        ]
        buffers.fill_decodes(shapes[size], requests, numbers_of())
        inputs = buffers.views(shapes[size], 24)
        buffers.resolve(inputs)
        assert inputs.token_ids.tolist() == [step] * len(requests) + [0] * (size - len(requests))
        for i, table in enumerate(chosen):
            assert inputs.attention.block_tables[i, : len(table)].tolist() == list(table)
            assert inputs.slot_mapping[i] == table[-1] * BLOCK_SIZE + BLOCK_SIZE - 1
            assert inputs.attention.context_lens[i] == BLOCK_SIZE * len(table)


def test_a_mixed_batch_is_laid_out_without_padding() -> None:
    requests = [request_of(1, [5], start=9), request_of(2, [6, 7, 8]), request_of(3, [1] * 20)]
    shape = StepShape(24, 2, 1, exact_capacity(requests, 16))
    buffers = make_buffers()
    inputs = buffers.views(shape, 24)
    rows = numbers_of()
    buffers.fill(shape, requests, StepNumbers([0, 3], [1], {}, rows.lora_words, rows.lora_words))
    buffers.resolve(inputs)
    assert inputs.token_ids.tolist() == [5, 6, 7, 8, *[1] * 20]
    assert inputs.positions.tolist() == [9, 0, 1, 2, *range(20)]
    assert inputs.attention.cu_seqlens_q.tolist() == [0, 1, 4, 24]
    assert inputs.attention.num_decodes == 1
    assert sorted(inputs.attention.tiles.tolist()) == [[1, 1], [2, 4], [2, 20]]
    assert (inputs.output_rows.tolist(), inputs.sample_rows.tolist()) == ([0, 3], [1])


@pytest.mark.parametrize("fill", [InputBuffers.fill, InputBuffers.fill_decodes])
def test_a_pending_token_is_the_one_that_the_last_step_sampled(fill: Any) -> None:
    buffers, shape = make_buffers(), decode_shape(4)
    requests = [request_of(1, [5]), request_of(2, [PENDING]), request_of(3, [PENDING])]
    lost = request_of(4, [PENDING])
    places = {request_key(requests[1]): 2, request_key(requests[2]): 0}
    inputs = buffers.views(shape, 24)
    buffers.sampled[:3] = torch.tensor([91, 92, 93])
    fill(buffers, shape, [*requests, lost], numbers_of([0, 1, 2, 3], places))
    buffers.resolve(inputs)
    assert inputs.token_ids.tolist() == [5, 93, 91, 0]
    assert buffers.sampled[:3].tolist() == [91, 92, 93], "the copy leaves them alone"


def test_another_life_of_a_request_is_another_request() -> None:
    first = request_of(1, [PENDING])
    assert request_key(first) != request_key(first._replace(life=2))


def test_the_views_of_a_shape_are_always_the_same_memory() -> None:
    buffers = make_buffers()
    first, again = (buffers.views(decode_shape(4, 9), 24) for _ in range(2))
    for name in ("token_ids", "sources", "positions", "slot_mapping", "lora_words"):
        assert getattr(first, name).data_ptr() == getattr(again, name).data_ptr()
    for name in ("context_lens", "cu_seqlens_q", "block_tables"):
        mine, theirs = getattr(first.attention, name), getattr(again.attention, name)
        assert mine.data_ptr() == theirs.data_ptr() and mine.data_ptr() % 64 == 0


def test_batches_beyond_the_capacity_are_refused() -> None:
    buffers = make_buffers()
    with pytest.raises(ValueError, match=r"41 rows .* there is room for 40 and 4096"):
        buffers.fill(decode_shape(41), (), numbers_of())
    with pytest.raises(ValueError, match="there is room for 40 and 4096"):
        buffers.views(decode_shape(4, lora_words=5000), 24)


def test_buffers_are_not_overwritten_before_their_copy_has_ended() -> None:
    """Copies happen only when waited for: a third step must wait for the first one's."""
    device, dice = LaggingDevice(), random.Random(0)
    buffers, shape = make_buffers(device), decode_shape(4)
    inputs, seen, written = buffers.views(shape, 24), [], []
    for _ in range(12):
        tokens = [dice.randrange(1000) for _ in range(4)]
        written.append(tokens)
        fill = dice.choice([buffers.fill, buffers.fill_decodes])
        fill(shape, [request_of(i, [t]) for i, t in enumerate(tokens)], numbers_of())

        def work() -> None:
            buffers.resolve(inputs)
            seen.append(inputs.token_ids.tolist())

        device.give(work)
    assert len(seen) < len(written), "the device never lags: the test tests nothing"
    device.synchronize()
    assert seen == written


# ==== packed copies ====


def test_copies_keep_shapes_types_and_order() -> None:
    device = HostDevice()
    upload, download = Upload(device), Download(device)
    for seed in range(4):
        dice = np.random.default_rng(seed)
        arrays = [
            dice.integers(-9, 9, (3, seed + 1)).astype(np.int32),
            dice.random((2, 5), dtype=np.float32),
            np.zeros((0, 3), np.int32),
        ]
        there = upload.send(arrays)
        assert [t.numpy().tolist() for t in there] == [a.tolist() for a in arrays]
        back = download.send(there).read()
        assert [t.numpy().tolist() for t in back] == [a.tolist() for a in arrays]


def test_uploads_that_grow_with_every_step_rarely_pin_new_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device, sizes = HostDevice(), list[int]()
    pinned = device.pinned
    monkeypatch.setattr(device, "pinned", lambda n: sizes.append(n) or pinned(n))
    upload = Upload(device)
    for length in range(100, 400):
        upload.send([np.zeros(length, np.int32)])
    assert len(sizes) <= 2 + 2 * 3, "two buffers, which double"


def test_unread_results_are_kept() -> None:
    device = LaggingDevice()
    download, arrivals = Download(device), []
    for number in range(5):
        arrivals.append((number, download.send([torch.full((3,), number, dtype=torch.int32)])))
        if number % 2:
            first, arrival = arrivals.pop(0)
            assert arrival.read()[0].tolist() == [first] * 3
    for number, arrival in arrivals:
        assert arrival.read()[0].tolist() == [number] * 3


# ==== adapters ====


class Table:
    def __init__(self, arena: Tensor) -> None:
        self.arena = arena
        self.calls: list[tuple[str, int]] = []

    def place(self, slot: int, offset_bytes: int, extent: AdapterExtent) -> None:
        self.calls.append(("place", slot))

    def move(self, slot: int, offset_bytes: int) -> None:
        self.calls.append(("move", slot))

    def evict(self, slot: int) -> None:
        self.calls.append(("evict", slot))


def packed(digest: str, nbytes: int, value: int) -> PackedAdapter:
    """Pack adapters in two pieces, of which the first is the larger one."""
    pieces = torch.full((nbytes,), value, dtype=torch.uint8).split(nbytes * 3 // 4)
    return PackedAdapter(AdapterExtent(digest, torch.float32, {}, nbytes), pieces)


def test_the_pieces_of_an_adapter_are_its_extent(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = make_weights()
    whole = torch.zeros(extent_nbytes(weights), dtype=torch.uint8)
    extent = pack_extent(weights, whole)
    monkeypatch.setattr(adapter_copies, "PIECE_BYTES", 1024)
    packed = pack_adapter(weights, HostDevice())
    assert packed.extent == extent
    assert [len(piece) for piece in packed.pieces[:-1]] == [1024] * (len(whole) // 1024)
    assert len(packed.pieces) > 2 and torch.equal(torch.cat(packed.pieces), whole)


@pytest.fixture
def adapters() -> dict[str, PackedAdapter]:
    return {"x": packed("x", 512, 1), "y": packed("y", 256, 2)}


def test_an_adapter_arrives_when_its_copy_has_ended(adapters: dict[str, PackedAdapter]) -> None:
    device, arena = LaggingDevice(), torch.zeros(4096, dtype=torch.uint8)
    copies = AdapterCopies(device, arena, 64, table := Table(arena), adapters.__getitem__)
    device.give(lambda: device.log.append("step"))
    copies.apply(ScheduledBatch((), adapter_loads=(AdapterLoad(1, "x", 3584, 512),)))
    assert table.calls == [("place", 1)]
    assert copies.arrived() == [] and not arena.any(), "launched, not done"
    device.run("side", 3)
    assert device.log == ["step"], "the copy waits for the step before it"
    assert (arena[3584:] == 1).all() and not arena[:3584].any()
    assert copies.arrived() == ["x"] and copies.arrived() == []


def test_memory_of_an_evicted_adapter_is_free_once_its_copy_has_ended(
    adapters: dict[str, PackedAdapter],
) -> None:
    """The next adapter, in the same place, is copied after it; the first never arrives."""
    device, arena = LaggingDevice(), torch.zeros(4096, dtype=torch.uint8)
    copies = AdapterCopies(device, arena, 64, Table(arena), adapters.__getitem__)
    copies.apply(ScheduledBatch((), adapter_loads=(AdapterLoad(1, "x", 3584, 512),)))
    again = (AdapterLoad(2, "y", 3584, 256),)
    copies.apply(ScheduledBatch((), adapter_evictions=(1,), adapter_loads=again))
    device.give(lambda: arena[3840:].fill_(9))
    device.run("main", 2)  # work on the main stream runs after the first copy
    assert (arena[3840:] == 9).all()
    device.synchronize()
    assert (arena[3584:3840] == 2).all() and (arena[3840:] == 9).all()
    assert copies.arrived() == ["y"]


def test_moves_are_done_in_order(adapters: dict[str, PackedAdapter]) -> None:
    arena = torch.arange(16).repeat_interleave(4).byte()
    copies = AdapterCopies(HostDevice(), arena, 4, table := Table(arena), adapters.__getitem__)
    moves = (BlockCopy(1, 2), BlockCopy(2, 3), AdapterMove(7, 32, 16), BlockCopy(0, 1))
    copies.apply(ScheduledBatch((), adapter_evictions=(3,), moves=moves))
    assert arena[:16:4].tolist() == [0, 0, 1, 1]
    assert table.calls == [("evict", 3), ("move", 7)]


def test_an_adapter_of_another_size_than_scheduled_fails(
    adapters: dict[str, PackedAdapter],
) -> None:
    arena = torch.zeros(4096, dtype=torch.uint8)
    copies = AdapterCopies(HostDevice(), arena, 64, Table(arena), adapters.__getitem__)
    with pytest.raises(AssertionError, match="another size"):
        copies.apply(ScheduledBatch((), adapter_loads=(AdapterLoad(1, "x", 0, 256),)))
