"""Tests that all memory shared by the runner's streams and the host is ordered by events.

Uses the real scheduler, runner and copies; the model only declares its reads and writes.
"""

import random
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from engine.backends.cuda.adapter_copies import AdapterCopies, PackedAdapter
from engine.backends.cuda.extent import AdapterExtent, move_bytes
from engine.backends.cuda.forward import DeviceForward, Numbers, StepLimits
from engine.backends.cuda.inputs import StepInputs
from engine.backends.cuda.packed_copies import Arrival, PinnedRing
from engine.backends.cuda.positions import DevicePositions
from engine.backends.cuda.runner import DeviceRunner
from engine.backends.runner import StepHandle
from engine.model.inputs import LoraBatch
from engine.scheduler.adapter_slots import AdapterSlots
from engine.scheduler.batch import AdapterMove, BlockCopy, ScheduledBatch
from engine.scheduler.block_manager import BlockManager
from engine.scheduler.memory import MemoryBudget
from engine.scheduler.request import CacheScope, Request, SamplingParams
from engine.scheduler.scheduler import Scheduler, SchedulerLimits
from tests.engine.support.ordered_device import MAIN, ClockEvent, OrderedDevice, Unordered, Watch

BLOCK_SIZE, BLOCK_BYTES, NUM_BLOCKS, HIDDEN, VOCAB = 4, 1024, 30, 8, 16
SIZES = {"u": 2048, "v": 3000, "w": 4096, "x": 6000, "y": 8192, "z": 9000}  # bytes of adapters
LIMITS = StepLimits(6, 24, 64, BLOCK_SIZE)
KINDS = ("decode", "prefill", "load", "arrival", "eviction", "block copy", "adapter move")
KINDS += ("abort", "lost step")


@dataclass
class Bank:
    """A bank whose plan is a slot per row; the table on the device has a row per slot."""

    device: OrderedDevice
    arena: Tensor
    places: dict[int, tuple[int, AdapterExtent]] = field(
        default_factory=dict[int, tuple[int, AdapterExtent]]
    )
    table: Tensor = field(default_factory=lambda: torch.zeros(64, dtype=torch.int32))
    scratch: Tensor = field(default_factory=lambda: torch.zeros(512, dtype=torch.uint8))

    def place(self, slot: int, offset_bytes: int, extent: AdapterExtent) -> None:
        assert slot not in self.places
        self.table[slot] = offset_bytes
        self.places[slot] = offset_bytes, extent

    def move(self, slot: int, offset_bytes: int) -> None:
        source, extent = self.places[slot]
        move_bytes(self.arena, source, offset_bytes, extent.nbytes, self.scratch)
        self.table[slot] = offset_bytes
        self.places[slot] = offset_bytes, extent

    def evict(self, slot: int) -> None:
        self.places.pop(slot, None)

    def max_words(self, num_rows: int) -> int:
        return num_rows

    def plan(self, row_slots: Sequence[int]) -> Numbers:
        return np.asarray(row_slots, np.int32)

    def batch(self, num_rows: int, words: Tensor) -> LoraBatch:
        return Words(words)

    def head(self, row_slots: Sequence[int]) -> None:
        return None


@dataclass(frozen=True)
class Words:
    words: Tensor

    def add(self, layer: int, site: str, x: Tensor, y: Tensor) -> None:
        raise AssertionError("the model does no arithmetic")


@dataclass
class Model:
    """Reads like a decoder, shrinks on the side stream and writes keys into their slots."""

    device: OrderedDevice
    arena: Tensor
    bank: Bank
    planes: Tensor = field(default_factory=lambda: torch.zeros(64))
    rows: Tensor = field(default_factory=lambda: torch.zeros(LIMITS.max_num_batched_tokens))
    head: Tensor = field(default_factory=lambda: torch.ones(HIDDEN, VOCAB))
    is_failing: bool = False

    def forward(
        self,
        inputs: StepInputs,
        lora: LoraBatch | None = None,
        output_lora: LoraBatch | None = None,
        *,
        out: Tensor,
    ) -> Tensor:
        device, rows = self.device, self.rows[: len(inputs.token_ids)]
        slot_mapping, attention = inputs.slot_mapping, inputs.attention
        if self.is_failing and device.dice.random() < 0.05:
            raise RuntimeError("the step is lost")
        device.use("embed", [inputs.token_ids, inputs.positions], [rows])
        if isinstance(lora, Words):
            reads = [rows, lora.words, self.bank.table, *self._extents(lora.words)]
            wait = device.beside(lambda: device.use("shrink", reads, [self.planes]))
            device.use("multiply", [rows])
            wait()
            device.use("expand", [self.planes], [rows])
        device.use("store", [slot_mapping, rows], self._slots(slot_mapping))
        tables = [attention.context_lens, attention.cu_seqlens_q, attention.block_tables]
        device.use("attention", [*tables, attention.tiles, *self._blocks(attention)], [rows])
        wanted = [inputs.output_rows] if len(out) < len(rows) else []
        device.use("norm", [rows, *wanted], [out])
        return out

    def logits(self, hidden: Tensor, head: Any = None) -> Tensor:
        return hidden @ self.head

    def _extents(self, words: Tensor) -> list[Tensor]:
        places = [self.bank.places[slot] for slot in set(words.tolist()) - {0}]
        return [self.arena[start : start + extent.nbytes] for start, extent in places]

    def _slots(self, slot_mapping: Tensor) -> list[Tensor]:
        size = BLOCK_BYTES // BLOCK_SIZE
        return [self.arena[s * size :][:size] for s in slot_mapping.tolist() if s >= 0]

    def _blocks(self, attention: DevicePositions) -> list[Tensor]:
        read: list[Tensor] = []
        pairs = zip(attention.context_lens, attention.block_tables, strict=True)
        for length, table in ((int(n), row.tolist()) for n, row in pairs):
            num_blocks = -(-length // BLOCK_SIZE)
            read += [self.arena[b * BLOCK_BYTES :][:BLOCK_BYTES] for b in table[:num_blocks]]
        return read


class Quiet(Model):
    """Hides the model's look-ups on the host, which are not work of the device."""

    def forward(self, *inputs: Any, **options: Any) -> Tensor:
        with _disable_current_modes():
            return super().forward(*inputs, **options)


def make_runner(device: OrderedDevice) -> DeviceRunner:
    arena = torch.zeros(NUM_BLOCKS * BLOCK_BYTES, dtype=torch.uint8)
    bank = Bank(device, arena)
    model = Quiet(device, arena, bank)
    forward = DeviceForward(
        device,
        model,
        bank,
        LIMITS,
        tile_tokens=8,
        hidden_size=HIDDEN,
        dtype=torch.float32,
        uses_graphs=True,
    )
    packed = {digest: packed_of(device, digest, nbytes) for digest, nbytes in SIZES.items()}
    with Watch(device):
        forward.capture_graphs()
    model.is_failing = True
    copies = AdapterCopies(device, arena, BLOCK_BYTES, bank, packed.__getitem__)
    return DeviceRunner(device, forward, copies)


def packed_of(device: OrderedDevice, digest: str, nbytes: int) -> PackedAdapter:
    pieces = tuple(device.pinned(n).fill_(ord(digest)) for n in (1024, nbytes - 1024))
    return PackedAdapter(AdapterExtent(digest, torch.float32, {}, nbytes), pieces)


def make_scheduler(runner: DeviceRunner, dice: random.Random) -> Scheduler:
    adapters = AdapterSlots(loads_are_immediate=False)
    for digest, nbytes in SIZES.items():
        adapters.set_ready(digest, nbytes)
    memory = MemoryBudget(
        NUM_BLOCKS * BLOCK_BYTES, BLOCK_BYTES, BlockManager(NUM_BLOCKS, BLOCK_SIZE), adapters
    )
    limits = SchedulerLimits(LIMITS.max_num_seqs, LIMITS.max_num_batched_tokens, 64)
    scheduler = Scheduler(limits, memory, pipeline_depth=runner.pipeline_depth)
    for i in range(30):
        scheduler.add(request_of(i, dice))
    return scheduler


def request_of(number: int, dice: random.Random) -> Request:
    penalty = dice.choice((0.0, 0.0, 0.5))
    sampling = SamplingParams(
        max_tokens=dice.randint(1, 9),
        temperature=dice.choice((0.0, 1.0)),
        presence_penalty=penalty,
        logprobs=dice.choice((None, None, 2)),
        prompt_logprobs=dice.choice((None, None, None, 1)),
        ignore_eos=True,
    )
    prompt = [dice.randrange(VOCAB) for _ in range(dice.randint(1, 30))]
    scope = CacheScope(adapter_digest=dice.choice(("", *SIZES)))
    first, *forks = (
        Request(str(number), prompt, sampling, 0.0, scope=scope, index=i)
        for i in range(dice.choice((1, 1, 3)))
    )
    first.forks = forks
    return first


def serve(device: OrderedDevice, seed: int) -> Counter[str]:
    """Run until all requests have ended, with aborts and failed steps; count the events."""
    dice, seen, now = random.Random(seed), Counter[str](), 0.0
    runner = make_runner(device)
    scheduler = make_scheduler(runner, dice)
    in_flight: deque[tuple[ScheduledBatch, StepHandle | None]] = deque()
    while scheduler.has_unfinished or in_flight:
        for digest in runner.arrived():
            scheduler.adapters.set_resident(digest)
            seen["arrival"] += 1
        now += 1.0
        assert now < 2000, "requests never end"
        if dice.random() < 0.03:
            seen["abort"] += len(scheduler.abort(str(dice.randrange(30))))
        batch = scheduler.schedule(now)
        if batch is not None:
            count(batch, seen)
            in_flight.append((batch, launch(runner, batch, device)))
        while len(in_flight) > (0 if batch is None else 1):
            done, handle = in_flight.popleft()
            if handle is None:
                seen["lost step"] += 1
                scheduler.fail(done)
                continue
            with Watch(device):
                rows = handle.result()
            scheduler.update(done, [row.token_ids for row in rows])
    return seen


def launch(runner: DeviceRunner, batch: ScheduledBatch, device: OrderedDevice) -> StepHandle | None:
    """Launch a step; return None if it raised midway."""
    try:
        with Watch(device):
            return runner.launch(batch)
    except RuntimeError:
        return None


def count(batch: ScheduledBatch, seen: Counter[str]) -> None:
    seen["decode"] += bool(batch.requests) and len(batch.requests[-1].token_ids) == 1
    seen["prefill"] += bool(batch.requests) and len(batch.requests[-1].token_ids) > 1
    seen["load"] += len(batch.adapter_loads)
    seen["eviction"] += len(batch.adapter_evictions)
    for move in batch.moves:
        seen["block copy"] += isinstance(move, BlockCopy)
        seen["adapter move"] += isinstance(move, AdapterMove)


def test_all_uses_of_shared_memory_are_ordered() -> None:
    seen = sum((serve(OrderedDevice(seed), seed) for seed in range(3)), Counter[str]())
    for what in KINDS:
        assert seen[what] > 2, f"{what}: the traffic is too tame to show anything"


# ==== the checker detects missing orders ====


class LoadsWaitForNothing(OrderedDevice):
    @contextmanager
    def side(self, after: Any) -> Any:
        with super().side(ClockEvent(self, {})):
            yield


class ShrinkIsNotJoined(OrderedDevice):
    def beside(self, work: Any) -> Any:
        super().beside(work)
        return lambda: None


class ShrinkDoesNotWait(OrderedDevice):
    def beside(self, work: Any) -> Any:
        clock = self.clocks[MAIN]
        self.clocks[MAIN] = {}
        try:
            wait = super().beside(work)
        finally:
            self.clocks[MAIN] = clock
        return wait


@pytest.mark.parametrize("broken", [LoadsWaitForNothing, ShrinkIsNotJoined, ShrinkDoesNotWait])
def test_a_missing_order_between_streams_is_detected(broken: type[OrderedDevice]) -> None:
    with pytest.raises(Unordered):
        for seed in range(4):
            serve(broken(seed), seed)


def take_at_once(ring: PinnedRing, nbytes: int) -> Tensor:
    """Take the same buffer again: two without a wait would suffice if every result is read."""
    ring._sent = [None] * len(ring._sent)
    ring._turn = 0
    return take(ring, nbytes)


def read_at_once(arrival: Arrival) -> list[Tensor]:
    arrival._event = ClockEvent(OrderedDevice(), {})
    return read(arrival)


take, read = PinnedRing.take, Arrival.read


@pytest.mark.parametrize(
    ("owner", "name", "hasty"),
    [(PinnedRing, "take", take_at_once), (Arrival, "read", read_at_once)],
)
def test_a_missing_wait_of_the_host_is_detected(
    monkeypatch: pytest.MonkeyPatch, owner: type, name: str, hasty: Any
) -> None:
    monkeypatch.setattr(owner, name, hasty)
    with pytest.raises(Unordered):
        for seed in range(4):
            serve(OrderedDevice(seed), seed)


def test_use_of_an_adapter_before_its_arrival_is_detected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ClockEvent, "is_done", lambda event: True)
    with pytest.raises(Unordered):
        for seed in range(4):
            serve(OrderedDevice(seed), seed)
