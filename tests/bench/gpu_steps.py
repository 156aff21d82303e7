"""Measures whole steps of the GPU engine's runner against the bytes that a step must read."""

from collections.abc import Iterator, Sequence

from tests.bench.gpu_adapters import MIXED_RANKS
from tests.bench.gpu_report import Goal, Row, attempt
from tests.bench.gpu_runner import RANK, Bench, Lane, Pace, paces
from tests.bench.gpu_setting import Setting

UNIFORM_RANK = sum(MIXED_RANKS) // len(MIXED_RANKS)

# Least share of the roofline, with an adapter per request; of base tokens/s, at 32 requests
OF_ROOFLINE = {("none", 1): 0.70, ("none", 32): 0.60, ("none", 128): 0.65, ("nf4", 1): 0.50}
OF_BASE = {("none", "shared"): 0.90, ("none", "distinct"): 0.80, ("nf4", "distinct"): 0.70}
LAUNCHES_S, SIDE_LAUNCHES_S = 0.65e-3, 0.35e-3  # for a step's adapters besides their bytes


def decode(setting: Setting, quantization: str) -> Iterator[Row]:
    bench = Bench(setting, quantization)
    rows = max(bench.sizes.batches)
    lane = bench.lane(rows)
    yield _captured(bench, lane, quantization)
    lane.load([RANK] * rows)
    order = sorted(bench.sizes.batches, key=lambda b: b not in (1, 32, 128, 256))
    for batch in order:
        if setting.budget.is_spent:
            return
        name = f"{quantization}: decode x{batch}"
        yield from attempt(name, decode_rows(bench, lane, quantization, batch), "1")
    few = min(rows, 32)
    if not setting.budget.is_spent:
        name = f"{quantization}: decode x{few}, mixed ranks"
        yield from attempt(name, _mixed_ranks(bench, lane, quantization, few), "3")
    if quantization == "none" and not setting.budget.is_spent:
        yield from attempt("base beside no adapters", _base_only(bench, lane, few), "2")
    if not setting.budget.is_spent:
        yield from attempt("side stream", _side_stream(bench, lane, quantization), "2")


def _captured(bench: Bench, lane: Lane, quantization: str) -> Row:
    figures = lane.made.graphs
    name = f"{quantization}: {figures.num_graphs} graphs captured"
    note = f"{figures.nbytes / 2**20:.0f} MiB; with all kernels {lane.start_s:.1f} s"
    return Row(name, figures.capture_s, "s", note=note)


def decode_rows(bench: Bench, lane: Lane, quantization: str, batch: int) -> Iterator[Row]:
    traffics = {
        "base": [0] * batch,
        "shared": [1] * batch,
        "distinct": list(range(1, batch + 1)),
    }
    if batch == 1:
        del traffics["shared"]
    made = paces({name: (lane, slots) for name, slots in traffics.items()}, bench.sizes.rounds)
    for traffic, slots in traffics.items():
        yield _step_row(bench, lane, quantization, traffic, slots, made[traffic])
    for traffic in [name for name in traffics if name != "base"]:
        yield from _beside_base(bench, lane, quantization, traffic, traffics[traffic], made)
    if batch in (1, 32, 256):
        yield _host_row(lane, quantization, traffics["distinct"], made["distinct"])


def _step_row(
    bench: Bench, lane: Lane, quantization: str, traffic: str, slots: Sequence[int], pace: Pace
) -> Row:
    batch = len(slots)
    floor, roofline = bench.floor_bytes(batch, lane.adapter_bytes(slots)), bench.setting.roofline
    floor_s = roofline.step_s(sum(floor.values()), _flops(bench, batch))
    bound = OF_ROOFLINE.get((quantization, batch)) if traffic == "distinct" else None
    parts = {f"{name}_ms": nbytes / roofline.bytes_per_s * 1e3 for name, nbytes in floor.items()}
    return Row(
        f"{quantization}: decode x{batch}, {traffic}",
        pace.step_s * 1e3,
        "ms",
        Goal(floor_s / pace.step_s, "the roofline", at_least=bound, target="1"),
        note=f"{batch / pace.step_s:.0f} tokens/s, launch {pace.host_s * 1e3:.2f} ms",
        numbers={"format": quantization, "batch": batch, "traffic": traffic} | parts,
    )


def _flops(bench: Bench, batch: int) -> float:
    """Count operations of linear layers, for bfloat16's rate; fp8's double rate is ignored."""
    shape = bench.setting.shape
    weights = sum(rows * columns for rows, columns in shape.linears.values()) * shape.num_layers
    return 2.0 * batch * (weights + shape.vocab_size * shape.hidden_size)


def _beside_base(
    bench: Bench,
    lane: Lane,
    quantization: str,
    traffic: str,
    slots: Sequence[int],
    made: dict[str, Pace],
) -> Iterator[Row]:
    batch, base, pace = len(slots), made["base"], made[traffic]
    name = f"{quantization}: decode x{batch}, {traffic}"
    least = OF_BASE.get((quantization, traffic)) if batch == 32 else None
    share = base.step_s / pace.step_s
    goal = Goal(share, "base tokens/s", at_least=least, target="2")
    yield Row(f"{name}, beside base", share * 100, "%", goal)
    yield _increment(bench, lane, f"{name}, increment", slots, pace.step_s - base.step_s)


def _increment(
    bench: Bench,
    lane: Lane,
    name: str,
    slots: Sequence[int],
    increment_s: float,
    launches_s: float = LAUNCHES_S,
) -> Row:
    floor_s = lane.adapter_bytes(slots) / bench.setting.roofline.bytes_per_s
    of = f"1.5 x its bytes + {launches_s * 1e3} ms"
    goal = Goal(increment_s / (1.5 * floor_s + launches_s), of, at_most=1.0, target="2")
    note = f"its bytes: {floor_s * 1e3:.3f} ms"
    return Row(name, increment_s * 1e3, "ms", goal, note)


def _host_row(lane: Lane, quantization: str, slots: Sequence[int], pace: Pace) -> Row:
    """Measure whether the device waits: a step's period against the same work queued ahead."""
    device_s = lane.device_s(slots)
    bound = 0.05 if len(slots) == 256 else None
    exposed = pace.step_s / device_s - 1
    return Row(
        f"{quantization}: x{len(slots)}, the device waits for the host",
        (pace.step_s - device_s) * 1e3,
        "ms",
        Goal(exposed, "the device's time of a step", at_most=bound, target="7"),
        note=f"device {device_s * 1e3:.2f} ms, launch {pace.host_s * 1e3:.2f} ms",
    )


def _mixed_ranks(bench: Bench, lane: Lane, quantization: str, batch: int) -> Iterator[Row]:
    """Compare mixed with uniform ranks of equal bytes; the second half of slots is uniform."""
    mixed = [MIXED_RANKS[i % len(MIXED_RANKS)] for i in range(batch)]
    lane.load([*mixed, *[UNIFORM_RANK] * batch])
    slots = list(range(1, 2 * batch + 1))
    cases = {"mixed": (lane, slots[:batch]), "uniform": (lane, slots[batch:])}
    made = paces(cases, bench.sizes.rounds)
    goal = Goal(
        made["mixed"].step_s / made["uniform"].step_s,
        "uniform ranks of the same sum",
        at_most=1.10 if batch % len(MIXED_RANKS) == 0 else None,
        target="3",
    )
    note = f"uniform {made['uniform'].step_s * 1e3:.3f} ms"
    yield Row(
        f"{quantization}: decode x{batch}, ranks 8 to 256",
        made["mixed"].step_s * 1e3,
        "ms",
        goal,
        note,
    )
    lane.load([RANK] * max(bench.sizes.batches))


def _base_only(bench: Bench, lane: Lane, batch: int) -> Iterator[Row]:
    """Compare batches without adapters to those of a runner that never had an adapter."""
    bare = bench.lane(batch, max_slots=1)
    slots = [0] * batch
    made = paces({"resident": (lane, slots), "none": (bare, slots)}, 2 * bench.sizes.rounds)
    share = made["none"].step_s / made["resident"].step_s
    goal = Goal(share, "base tokens/s without any adapter", at_least=0.985, target="2")
    name = f"base x{batch} beside {max(bench.sizes.batches)} resident adapters"
    yield Row(name, share * 100, "%", goal)


def _side_stream(bench: Bench, lane: Lane, quantization: str) -> Iterator[Row]:
    """Measure what adapters add if shrink runs concurrently with the base's product."""
    rows = min(max(bench.sizes.batches), 128)
    beside = bench.lane(rows, side_stream=True)
    beside.load([RANK] * rows)
    for batch in (b for b in (1, 32, 128) if b <= rows):
        slots = list(range(1, batch + 1))
        cases = {"base": (lane, [0] * batch), "main": (lane, slots), "beside": (beside, slots)}
        made = paces(cases, bench.sizes.rounds)
        added_s = made["beside"].step_s - made["base"].step_s
        name = f"{quantization}: decode x{batch}, distinct, side stream, increment"
        row = _increment(bench, beside, name, slots, added_s, SIDE_LAUNCHES_S)
        ratio = made["main"].step_s / made["beside"].step_s
        note = f"{row.note}; {ratio:.3f} x the speed of one stream"
        yield Row(row.name, row.value, row.unit, row.goal, note)
