"""Tests shrink and expand of mixed batches against plain torch, and rows alone against batches.

Tolerances: h is rounded to bfloat16 (2^-9 of it, on both sides, whose float32 sums differ in the
order of additions) and y once more; errors are relative to the sum of the absolute products.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from engine.backends.native import structs
from engine.backends.native.bank import NativeAdapter
from engine.backends.native.library import Context
from engine.backends.native.panels import PanelWeights
from engine.lora.weights import SiteWeights

KEY = (0, "site")
NAN, INF = float("nan"), float("inf")
EPSILON = 2**-8  # of bfloat16
PAD = 5  # columns after each row of x and y that must not be touched

Module = tuple[int, int, Tensor, Tensor]  # out0, out1, A [r, in], B [r, out1 - out0]


@dataclass(frozen=True, slots=True)
class Adapter:
    """One site: each module's factors in bfloat16, and the same in the kernels' layout."""

    modules: tuple[Module, ...]
    native: NativeAdapter


def in_panels(b: Tensor) -> Tensor:
    """Pack into the layout of kernels.h, one rank at a time, as specified there."""
    ranks, width = b.shape
    panels = torch.zeros(-(-width // 32), (ranks + 1) // 2, 32, 2, dtype=b.dtype)
    for r in range(ranks):
        columns = torch.nn.functional.pad(b[r], (0, -width % 32))
        panels[:, r // 2, :, r % 2] = columns.view(-1, 32)
    return panels


def adapter(
    ranks: Sequence[int], widths: Sequence[int], in_features: int, seed: int = 0
) -> Adapter:
    """Make a module of each rank, side by side; a module of rank 0 is not targeted."""
    generator = torch.Generator().manual_seed(seed)
    modules: list[Module] = []
    expands: list[tuple[int, int, int, int, Tensor]] = []
    r0 = out0 = 0
    for rank, width in zip(ranks, widths, strict=True):
        if rank:
            a = torch.randn(rank, in_features, generator=generator).bfloat16()
            b = torch.randn(rank, width, generator=generator).bfloat16()
            modules.append((out0, out0 + width, a, b))
            expands.append((r0, r0 + rank, out0, out0 + width, in_panels(b)))
            r0 += rank
        out0 += width
    sites = {}
    if modules:
        sites[KEY] = SiteWeights(torch.cat([a for _, _, a, _ in modules]), tuple(expands))
    weights = PanelWeights(f"adapter-{seed}", sites, 0)
    return Adapter(tuple(modules), NativeAdapter(weights, [KEY]))


@dataclass(slots=True)
class Case:
    """Rows of x and of the base's y, and the adapter of each row by its index, -1 for none."""

    adapters: Sequence[Adapter]
    of_row: Sequence[int]
    in_features: int
    out_features: int
    x: Tensor = field(init=False)
    y: Tensor = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(len(self.of_row))
        shape = (len(self.of_row), self.in_features + PAD)
        scale = self.in_features**-0.5
        self.x = (torch.randn(shape, generator=generator) * scale).bfloat16()
        shape = (len(self.of_row), self.out_features + PAD)
        self.y = torch.randn(shape, generator=generator).bfloat16()

    def run(self, context: Context, chosen: Sequence[int] | None = None) -> Tensor:
        """Run the kernels; return y [rows, out], for `chosen` rows alone if given."""
        chosen = range(len(self.of_row)) if chosen is None else chosen
        x, y = self.x[list(chosen)], self.y[list(chosen)]
        add(context, self.adapters, [self.of_row[i] for i in chosen], x, y, self.in_features)
        assert torch.equal(y[:, self.out_features :], self.y[list(chosen), self.out_features :])
        return y[:, : self.out_features]

    def expected(self) -> tuple[Tensor, Tensor]:
        """Return y in float32, and its allowed error."""
        y = self.y[:, : self.out_features].float()
        error = y.abs() * EPSILON
        for row, index in enumerate(self.of_row):
            for out0, out1, a, b in self.adapters[index].modules if index >= 0 else ():
                h = (a.float() @ self.x[row, : self.in_features].float()).bfloat16().float()
                size = a.float().abs() @ self.x[row, : self.in_features].float().abs()
                y[row, out0:out1] += h @ b.float()
                # h: half a unit on each side and float32 sums; then y's own rounding
                off = h.abs() * EPSILON + size * 2**-20
                error[row, out0:out1] += off @ b.float().abs()
        return y, error + y.abs() * EPSILON


def add(
    context: Context,
    adapters: Sequence[Adapter],
    of_row: Sequence[int],
    x: Tensor,
    y: Tensor,
    in_features: int,
) -> None:
    """Run rows in any order in one call, with NaN around h that must not be read."""
    active = sorted({i for i in of_row if i >= 0})
    listed = [[row for row, i in enumerate(of_row) if i == index] for index in active]
    rows = torch.tensor([row for own in listed for row in own], dtype=torch.int32)
    segments = (structs.ReefLoraSegment * len(active))()
    start = 0
    for segment, index, own in zip(segments, active, listed, strict=True):
        segment.sites, segment.start, segment.end = (
            adapters[index].native.table.pointer,
            start,
            start + len(own),
        )
        start += len(own)
    rank = max((adapters[i].native.table.lora_rank for i in active), default=0)
    h = torch.full((max(1, start), rank + 2 + rank % 2), NAN).bfloat16()
    batch = structs.ReefLoraBatch(segments, rows.data_ptr(), len(active), rank)
    context.function("lora", structs.ReefLoraArgs)(
        structs.ReefLoraArgs(
            batch=batch_pointer(batch),
            site=0,
            in_features=in_features,
            x=x.data_ptr(),
            x_stride=x.stride(0),
            y=y.data_ptr(),
            y_stride=y.stride(0),
            h=h.data_ptr(),
            h_stride=h.stride(0),
        )
    )


def batch_pointer(batch: structs.ReefLoraBatch) -> object:
    return structs.c.pointer(batch)


def assert_right(case: Case, got: Tensor) -> None:
    expected, error = case.expected()
    worst = ((got.float() - expected).abs() / error.clamp_min(1e-30)).max().item()
    assert worst <= 1, f"{worst:.2f} times the error that is allowed"


def traffic(kind: str, adapters: int, rows: int) -> list[int]:
    """Draw each row's adapter, including -1, the base."""
    rng = random.Random(rows)
    if kind == "identical":
        return [1] * rows
    if kind == "distinct":
        return [i % (adapters + 1) - 1 for i in range(rows)]
    weights = {"uniform": 0.0, "zipf": 1.0, "skewed": 3.0}[kind]
    choices = list(range(-1, adapters))
    return rng.choices(choices, [(i + 1) ** -weights for i in range(adapters + 1)], k=rows)


def mixed_adapters(in_features: int, widths: Sequence[int]) -> list[Adapter]:
    """Make adapters of ranks 1 to 64, equal or by a pattern, some modules untargeted."""
    patterns = [[1] * 3, [3] * 3, [8] * 3, [16] * 3, [64] * 3, [2, 9, 5], [0, 7, 0], [16, 0, 4]]
    return [adapter(p, widths, in_features, seed) for seed, p in enumerate(patterns)]


KINDS = ["identical", "distinct", "uniform", "zipf", "skewed"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 7, 40, 150])
def test_every_row_gets_its_own_adapter(context: Context, kind: str, rows: int) -> None:
    widths = [96, 33, 32]
    case = Case(mixed_adapters(100, widths), traffic(kind, 8, rows), 100, sum(widths))
    assert_right(case, case.run(context))


@pytest.mark.parametrize("in_features", [1, 31, 32, 33, 64, 576, 897])
@pytest.mark.parametrize("width", [1, 15, 17, 64, 130])
def test_any_width_works(context: Context, in_features: int, width: int) -> None:
    adapters = [adapter([r], [width], in_features, seed=r) for r in (1, 4, 7)]
    case = Case(adapters, [0, 1, 2, 2, 1, 2, 2, 2, -1], in_features, width)
    assert_right(case, case.run(context))


@pytest.mark.parametrize("rank", [1, 2, 3, 5, 8, 16, 30, 64, 256])
def test_any_rank_works_at_sizes_that_are_cut_into_many_chunks(context: Context, rank: int) -> None:
    adapters = [adapter([rank, rank], [700, 2000], 896, seed=rank)]
    case = Case(adapters, [0] * 37, 896, 2700)
    assert_right(case, case.run(context))


def test_modules_of_very_different_ranks_share_a_site(context: Context) -> None:
    adapters = [adapter([256, 1, 8], [500, 90, 40], 300), adapter([1, 64, 3], [500, 90, 40], 300)]
    case = Case(adapters, [0, 1] * 20, 300, 630)
    assert_right(case, case.run(context))


@pytest.mark.parametrize("kind", KINDS)
def test_a_rows_bits_do_not_depend_on_batch_mates(context: Context, kind: str) -> None:
    """Compare a row alone, a decode, to the row among 120 of few adapters, a prefill."""
    widths = [300, 40, 40]
    case = Case(mixed_adapters(577, widths), traffic(kind, 8, 120), 577, sum(widths))
    together = case.run(context)
    for row in range(0, 120, 7):
        assert torch.equal(case.run(context, [row])[0], together[row])
    backwards = case.run(context, list(reversed(range(120))))
    assert torch.equal(backwards.flip(0), together)
    for rows in (2, 3, 5, 31, 33):
        assert torch.equal(case.run(context, range(rows)), together[:rows])


@pytest.mark.parametrize("rank", [1, 3, 4, 16, 41])
def test_a_prefill_gives_each_row_the_bits_of_a_decode(context: Context, rank: int) -> None:
    case = Case([adapter([rank], [1100], 897)], [0] * 70, 897, 1100)
    together = case.run(context)
    alone = torch.cat([case.run(context, [row]) for row in range(70)])
    assert torch.equal(together, alone)


def test_bits_do_not_depend_on_the_number_of_threads(isa: str) -> None:
    widths = [900, 100, 100]
    case = Case(mixed_adapters(896, widths), traffic("zipf", 8, 60), 896, sum(widths))
    results: list[Tensor] = []
    for threads in (1, 2, 4):
        context = Context(isa, threads)
        results.append(case.run(context))
        context.close()
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_rows_of_the_base_keep_their_bits(context: Context) -> None:
    widths = [64, 64, 64]
    case = Case(mixed_adapters(64, widths), [-1, 0, -1, 4, 4, -1], 64, 192)
    case.y[0, 3], case.y[2, 7] = NAN, -0.0
    got = case.run(context)
    for row in (0, 2, 5):
        expected = case.y[row, :192]
        assert torch.equal(got[row].view(torch.int16), expected.view(torch.int16))


def test_columns_of_untargeted_modules_keep_their_bits(context: Context) -> None:
    case = Case([adapter([0, 7, 0], [50, 30, 20], 64)], [0] * 5, 64, 100)
    case.y[:, 10], case.y[:, 90] = NAN, -0.0
    got, before = case.run(context).view(torch.int16), case.y[:, :100].view(torch.int16)
    assert torch.equal(got[:, :50], before[:, :50]) and torch.equal(got[:, 80:], before[:, 80:])
    assert not torch.equal(got[:, 50:80], before[:, 50:80])


def test_nothing_happens_without_adapters_or_where_none_touches_the_site(context: Context) -> None:
    case = Case([adapter([0], [40], 64)], [-1, -1, -1], 64, 40)
    assert torch.equal(case.run(context), case.y[:, :40])
    case.of_row = [0, 0, -1]
    assert torch.equal(case.run(context), case.y[:, :40])


@pytest.mark.parametrize("bad", [NAN, INF, 3e38])
def test_a_tenants_overflow_stays_in_its_rows(context: Context, bad: float) -> None:
    widths = [64, 33, 40]
    adapters = mixed_adapters(100, widths)
    case = Case(adapters, [0, 1, 2, 3, 3, 4, 5, -1] * 6, 100, sum(widths))
    clean = case.run(context)
    huge = adapters[3].native.weights.sites[KEY]
    huge.a.fill_(bad)
    dirty = case.run(context)
    for row, index in enumerate(case.of_row):
        if index == 3:
            assert not dirty[row].isfinite().all()
        else:
            assert torch.equal(dirty[row], clean[row])


def test_a_nan_stays_in_its_row_even_if_others_share_the_adapter(context: Context) -> None:
    case = Case([adapter([16], [200], 100)], [0] * 40, 100, 200)
    clean = case.run(context)
    case.x[17, 99] = NAN
    dirty = case.run(context)
    assert dirty[17].isnan().all()
    others = [row for row in range(40) if row != 17]
    assert torch.equal(dirty[others], clean[others])


def test_a_modules_overflow_does_not_reach_other_modules_columns(context: Context) -> None:
    """The first module's odd last rank must be paired with zeros, not with the second's ranks."""
    ours = adapter([3, 5], [70, 30], 64)
    case = Case([ours], [0] * 9, 64, 100)
    clean = case.run(context)
    ours.native.weights.sites[KEY].a[3:].fill_(NAN)
    dirty = case.run(context)
    assert torch.equal(dirty[:, :70], clean[:, :70])
    assert dirty[:, 70:].isnan().all()
