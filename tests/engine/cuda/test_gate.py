"""Tests the gated activation against the reference."""

import pytest
import torch

from engine.backends.cuda.triton.gate import ACTIVATIONS, BLOCK, gate
from engine.model import reference
from engine.model.fp8 import E4m3Rows, quantize_rows

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SLACK = {torch.float32: 4e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return (
        torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(3).to(DEVICE, dtype)
    )


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # by numpy, in the interpreter
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [40, BLOCK + 8])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gate_matches_the_reference(activation: str, width: int, dtype: torch.dtype) -> None:
    gate_up = normal(2, 2 * width, dtype=dtype)
    gate_up[0, :4] = torch.tensor([0.0, -0.0, 60.0, -60.0])
    out, kept = torch.full((2, width), torch.nan, dtype=dtype, device=DEVICE), gate_up.clone()
    gate(gate_up, out, activation)
    expected = reference.GATED_ACTIVATIONS[activation](gate_up)
    torch.testing.assert_close(out, expected, rtol=SLACK[dtype], atol=SLACK[dtype])
    assert torch.equal(gate_up, kept)


def test_every_activation_of_the_decoder_is_supported() -> None:
    assert set(ACTIVATIONS) == reference.GATED_ACTIVATIONS.keys()
    with pytest.raises(ValueError, match="'relu' is not one of silu, gelu, gelu_tanh"):
        gate(torch.empty(1, 2), torch.empty(1, 1), "relu")


@pytest.mark.parametrize("is_rounded", [False, True])
def test_a_row_is_the_same_in_any_batch(is_rounded: bool) -> None:
    gate_up = normal(4, 80)
    gate_up[1] = torch.nan

    def run(rows: slice) -> torch.Tensor:
        count = len(gate_up[rows])
        out = torch.empty(count, 40, device=DEVICE)
        rounded = E4m3Rows.empty(count, 40, DEVICE) if is_rounded else None
        gate(gate_up[rows], out, "silu", rounded=rounded)
        return out if rounded is None else rounded.codes.float() * rounded.scales

    whole = run(slice(0, 4))
    assert torch.equal(run(slice(2, 3))[0], whole[2])
    assert torch.equal(run(slice(0, 1))[0], whole[0])
    run(slice(0, 0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [40, BLOCK + 8])
def test_gate_can_also_output_fp8(width: int, dtype: torch.dtype) -> None:
    gate_up = normal(2, 2 * width, dtype=dtype)
    out, rows = torch.empty(2, width, dtype=dtype, device=DEVICE), E4m3Rows.empty(2, width, DEVICE)
    gate(gate_up, out, "silu", rounded=rows)
    expected, alone = quantize_rows(out), torch.empty_like(out)
    assert torch.equal(rows.scales, expected.scales)
    assert torch.equal(rows.codes.float(), expected.codes.float())
    gate(gate_up, alone, "silu")
    assert torch.equal(alone, out)
