"""Tests embed, norm, gate, gather and greedy against torch, and rows alone against batches.

Tolerances: both sides compute in float32 and round once to bfloat16, so they differ by at most one
unit of bfloat16 (2^-8 of the value), if a float32 error changes the rounding.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.backends.native import structs
from engine.backends.native.library import FUNCTIONS, Context
from engine.model import reference

WIDTHS = [1, 15, 16, 33, 64, 96, 127, 576, 896, 1000]
ONE_UNIT = {"rtol": 2**-7, "atol": 1e-30}  # in bfloat16, with 8 significant bits
NAN, INF = float("nan"), float("inf")


def random_rows(rows: int, width: int, spread: float = 1.0, seed: int = 0) -> Tensor:
    """Make bf16 rows in a wider buffer, so that a kernel that ignores the stride fails."""
    generator = torch.Generator().manual_seed(seed + rows * 10007 + width)
    return (torch.randn(rows, width + 7, generator=generator) * spread).bfloat16()[:, :width]


def run(context: Context, name: str, **fields: object) -> None:
    context.function(name, FUNCTIONS[name])(FUNCTIONS[name](**fields))


def place(name: str, rows: Tensor) -> dict[str, int]:
    return {name: rows.data_ptr(), f"{name}_stride": rows.stride(0)}


# ==== embed and gather ====


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scale", [1.0, 11.3125])
def test_embed_scales_the_tokens_rows(context: Context, width: int, scale: float) -> None:
    table = random_rows(40, width).contiguous()
    ids = torch.tensor([3, 39, 0, 3, 17], dtype=torch.int32)
    x = torch.full((5, width + 3), 9.0).bfloat16()
    run(
        context,
        "embed",
        table=table.data_ptr(),
        token_ids=ids.data_ptr(),
        **place("x", x),
        scale=scale,
        rows=5,
        width=width,
    )
    assert torch.equal(x[:, :width], (table[ids.long()].float() * scale).bfloat16())
    assert torch.equal(x[:, width:], torch.full((5, 3), 9.0).bfloat16())


@pytest.mark.parametrize("rows", [1, 5, 700])
def test_gather_copies_rows_in_the_order_asked_for(context: Context, rows: int) -> None:
    x = random_rows(9, 101)
    chosen = torch.randint(9, (rows,), dtype=torch.int32)
    y = torch.full((rows, 104), 9.0).bfloat16()
    run(
        context,
        "gather",
        **place("x", x),
        rows_of_x=chosen.data_ptr(),
        **place("y", y),
        rows=rows,
        width=101,
    )
    assert torch.equal(y[:, :101], x[chosen.long()])
    assert torch.equal(y[:, 101:], torch.full((rows, 3), 9.0).bfloat16())


# ==== norm ====


def norm(
    context: Context,
    x: Tensor,
    weight: Tensor,
    delta: Tensor | None = None,
    delta_scale: float = 1.0,
    groups: int = 1,
    y: Tensor | None = None,
    eps: float = 1e-5,
) -> None:
    run(
        context,
        "norm",
        **place("x", x),
        **({} if delta is None else place("delta", delta)),
        **({} if y is None else place("y", y)),
        weight=weight.data_ptr(),
        delta_scale=delta_scale,
        eps=eps,
        rows=x.shape[0],
        width=x.shape[1] // groups,
        groups=groups,
    )


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [1, 3, 130])
def test_norm_matches_the_reference(context: Context, width: int, rows: int) -> None:
    x, weight = random_rows(rows, width, 3.0), torch.rand(width) + 0.5
    before, y = x.clone(), torch.zeros_like(x)
    norm(context, x, weight, y=y)
    torch.testing.assert_close(y, reference.rms_norm(x, weight, 1e-5), **ONE_UNIT)
    assert torch.equal(x, before)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("delta_scale", [1.0, 0.22])
def test_norm_adds_the_delta_and_reads_the_rounded_sum(
    context: Context, width: int, delta_scale: float
) -> None:
    x, delta, weight = random_rows(5, width), random_rows(5, width, 2.0, 1), torch.rand(width)
    exact = torch.addcmul(x.double(), delta.double(), torch.tensor(delta_scale).double())
    expected, y = exact.float().bfloat16(), torch.zeros_like(x)
    norm(context, x, weight, delta, delta_scale, y=y)
    assert torch.equal(x, expected)
    torch.testing.assert_close(y, reference.rms_norm(expected, weight, 1e-5), **ONE_UNIT)


def test_norm_without_an_output_only_adds(context: Context) -> None:
    x, delta = random_rows(4, 99), random_rows(4, 99, 1.0, 1)
    expected = (x.float() + delta.float()).bfloat16()
    norm(context, x, torch.ones(99), delta)
    assert torch.equal(x, expected)


@pytest.mark.parametrize("width", [24, 64, 128])
def test_norm_of_groups_is_one_norm_per_head_and_works_in_place(
    context: Context, width: int
) -> None:
    x, weight = random_rows(70, 6 * width), torch.rand(width)
    expected = reference.rms_norm(x.reshape(70, 6, width), weight, 1e-5).flatten(1)
    norm(context, x, weight, groups=6, y=x)
    torch.testing.assert_close(x, expected, **ONE_UNIT)


@pytest.mark.parametrize("width", [33, 896])
def test_a_rows_norm_does_not_depend_on_batch_mates(context: Context, width: int) -> None:
    x, delta, weight = random_rows(150, width), random_rows(150, width, 1.0, 1), torch.rand(width)
    alone_x, together, alone = x.clone(), torch.zeros_like(x), torch.zeros_like(x)
    norm(context, x, weight, delta, y=together)
    for i in range(150):
        row = slice(i, i + 1)
        norm(context, alone_x[row], weight, delta[row], y=alone[row])
    assert torch.equal(together, alone) and torch.equal(x, alone_x)


def test_norm_keeps_a_nan_and_an_overflow_in_their_rows(context: Context) -> None:
    x, weight = random_rows(4, 100), torch.rand(100)
    clean, y = torch.zeros_like(x), torch.zeros_like(x)
    norm(context, x, weight, y=clean)
    x[1, 50], x[2, 99] = NAN, INF
    norm(context, x, weight, y=y)
    assert torch.equal(y[[0, 3]], clean[[0, 3]])
    assert y[1].isnan().all() and y[2, 99].isnan()


# ==== gate ====


def gate(context: Context, x: Tensor, activation: str) -> Tensor:
    rows, width = x.shape[0], x.shape[1] // 2
    y = torch.full((rows, width + 3), 9.0).bfloat16()
    run(
        context,
        "gate",
        **place("x", x),
        **place("y", y),
        rows=rows,
        width=width,
        activation=structs.ACTIVATIONS[activation],
    )
    assert torch.equal(y[:, width:], torch.full((rows, 3), 9.0).bfloat16())
    return y[:, :width]


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 15), (2, 96), (40, 577), (1, 9000), (130, 1536)])
def test_gate_is_the_activation_times_the_other_half(
    context: Context, activation: str, shape: tuple[int, int]
) -> None:
    x = random_rows(shape[0], 2 * shape[1], 3.0)
    wide = x.double()
    expected = ACTIVATIONS[activation](wide[:, : shape[1]]) * wide[:, shape[1] :]
    # 1e-6: the float32 error of the activation, before it is multiplied by up to 15
    torch.testing.assert_close(
        gate(context, x, activation), expected.bfloat16(), rtol=2**-7, atol=1.5e-5
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_is_right_to_a_millionth_at_every_bfloat16(
    context: Context, activation: str
) -> None:
    """Scale by 2^-20, so that errors of 1e-6 show despite rounding to 8 bits, near zero."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    every = every[every.isfinite() & (every.abs() <= 2.0**60)]
    x = torch.cat([every, torch.ones_like(every)])[None]
    expected = ACTIVATIONS[activation](every.double())
    torch.testing.assert_close(
        gate(context, x, activation)[0].double(), expected, rtol=2**-8 * 1.001, atol=1e-6
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_rows_gate_does_not_depend_on_batch_mates(context: Context, activation: str) -> None:
    for width in (100, 5000):
        x = random_rows(70, 2 * width, 2.0)
        together = gate(context, x, activation)
        alone = torch.cat([gate(context, x[i : i + 1], activation) for i in range(70)])
        assert torch.equal(together, alone)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gate_keeps_a_nan_in_its_element(context: Context, activation: str) -> None:
    x = random_rows(3, 200)
    clean = gate(context, x, activation).clone()
    x[1, 7], x[1, 150] = NAN, NAN
    dirty = gate(context, x, activation)
    assert dirty[1].isnan().nonzero().flatten().tolist() == [7, 50]
    assert torch.equal(dirty[[0, 2]], clean[[0, 2]])


# ==== greedy ====


def greedy(context: Context, logits: Tensor) -> tuple[list[int], Tensor]:
    rows, vocab = logits.shape
    ids, highest = torch.full((rows,), -1, dtype=torch.int32), torch.zeros(rows)
    run(
        context,
        "greedy",
        **place("logits", logits),
        token_ids=ids.data_ptr(),
        highest=highest.data_ptr(),
        rows=rows,
        vocab=vocab,
    )
    return ids.tolist(), highest


@pytest.mark.parametrize("vocab", [1, 15, 64, 1000, 1024, 1025, 5000])
def test_greedy_finds_the_largest_and_its_index(context: Context, vocab: int) -> None:
    logits = torch.randn(6, vocab + 5, generator=torch.Generator().manual_seed(vocab))[:, :vocab]
    ids, highest = greedy(context, logits)
    assert ids == logits.argmax(-1).tolist()
    assert torch.equal(highest, logits.max(-1).values)


@pytest.mark.parametrize("first", [0, 3, 70, 1023, 1024, 2999])
def test_of_equal_logits_greedy_takes_the_first(context: Context, first: int) -> None:
    logits = torch.zeros(1, 3000)
    logits[0, first:] = 2.5
    assert greedy(context, logits)[0] == [first]


@pytest.mark.parametrize("position", [0, 63, 64, 1500, 2999])
def test_a_nan_anywhere_makes_only_its_rows_highest_nan(context: Context, position: int) -> None:
    logits = torch.randn(3, 3000)
    logits[1, position] = NAN
    ids, highest = greedy(context, logits)
    assert highest.isnan().tolist() == [False, True, False]
    assert 0 <= ids[1] < 3000


def test_infinite_logits_are_numbers_to_greedy(context: Context) -> None:
    logits = torch.full((2, 2000), -INF)
    logits[1, 1999] = INF
    ids, highest = greedy(context, logits)
    assert ids == [0, 1999]
    assert highest.tolist() == [-INF, INF]
