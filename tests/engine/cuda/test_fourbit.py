"""Tests the quantized GEMM against `dequantize`: weights bit for bit, products within rounding.

Triton's interpreter does not run PTX; the PTX of the kernels is interpreted here, word by word.
"""

import re
import struct
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from engine.backends.cuda.triton import nf4_lookup
from engine.backends.cuda.triton.crossovers import GemmTiles, Shape, choose, unmeasured
from engine.backends.cuda.triton.dequantize import dequantize as dequantize_packed
from engine.backends.cuda.triton.fourbit import multiply, planes_size
from engine.backends.cuda.triton.packed_weight import PackedWeight, pack
from engine.model.quantized_weight import NF4_VALUES, QuantizedWeight, dequantize, dequantize_to

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SMALL = GemmTiles(16, 64, num_warps=4, num_stages=2)
SPLIT = GemmTiles(16, 128, num_warps=4, num_stages=2, split_k=2)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def make_weight(
    format: str,
    out_features: int,
    in_features: int,
    group_size: int = 64,
    *,
    order: bool = False,
    whole: bool = False,
) -> QuantizedWeight:
    """Make random codes, scales of either sign, and zeros from 0 to 15, `whole` or not."""
    g = torch.Generator().manual_seed(out_features + in_features)
    if format == "int8":
        codes = torch.randint(-128, 128, (out_features, in_features), generator=g)
        scales = torch.rand(out_features, 1, generator=g) / 100
        return QuantizedWeight("int8", codes.to(torch.int8), scales, in_features)
    codes = torch.randint(0, 256, (out_features, in_features // 2), generator=g).to(torch.uint8)
    shape = (out_features, in_features // group_size)
    scales = torch.randn(shape, generator=g) / 10
    zeros = torch.rand(shape, generator=g) * 15 if format == "int4" else None
    zeros = zeros.round() if zeros is not None and whole else zeros
    permutation = torch.randperm(in_features, generator=g).int() if order else None
    return QuantizedWeight(format, codes, scales, group_size, zeros, permutation)


WEIGHTS: dict[str, Callable[[], QuantizedWeight]] = {
    "nf4": lambda: make_weight("nf4", 72, 128),
    "nf4_groups_of_32": lambda: make_weight("nf4", 130, 96, 32),
    "int4_groups_of_128": lambda: make_weight("int4", 72, 256, 128),
    "int4_one_group": lambda: make_weight("int4", 40, 96, 96),
    "int4_whole_zeros": lambda: make_weight("int4", 40, 128, whole=True),
    "int8": lambda: make_weight("int8", 72, 128),
    "int8_odd": lambda: make_weight("int8", 41, 72),
}


def fused(
    x: torch.Tensor, weight: PackedWeight, tiles: GemmTiles, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Run the fused kernel on the device, with arguments and result on the CPU."""
    shape = (len(x), weight.out_features)
    out = torch.full(shape, torch.nan, dtype=x.dtype, device=DEVICE)
    planes = torch.full((planes_size(weight, len(x), tiles),), torch.nan, device=DEVICE)
    bias = None if bias is None else bias.to(DEVICE)
    multiply(x.to(DEVICE), weight, bias, out, planes, tiles)
    return out.cpu()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", WEIGHTS)
def test_dequantized_weights_equal_the_reference_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    weight = WEIGHTS[name]()
    shape = (weight.out_features, weight.in_features)
    dense = torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)
    dequantize_packed(pack(weight, DEVICE), dense)
    assert torch.equal(dense.cpu(), dequantize_to(weight, dtype, CPU))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", WEIGHTS)
def test_products_with_unit_vectors_are_the_weights_bit_for_bit(
    name: str, dtype: torch.dtype
) -> None:
    weight = WEIGHTS[name]()
    inputs = [0, 1, 5, 31, weight.in_features // 2, weight.in_features - 1]
    unit = torch.eye(weight.in_features, dtype=dtype)[inputs]
    expected = dequantize_to(weight, dtype, CPU)[:, inputs].t()
    assert torch.equal(fused(unit, pack(weight, DEVICE), SMALL), expected)


@pytest.mark.parametrize("tiles", [SMALL, SPLIT], ids=["whole", "split"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["nf4", "int4_whole_zeros", "int8_odd"])
def test_product_equals_that_of_the_dense_weight(
    name: str, dtype: torch.dtype, tiles: GemmTiles
) -> None:
    weight = WEIGHTS[name]()
    x = torch.randn(19, weight.in_features, generator=torch.Generator().manual_seed(1)).to(dtype)
    bias = torch.randn(weight.out_features, generator=torch.Generator().manual_seed(2))
    packed = pack(weight, DEVICE)
    padded = torch.nn.functional.pad(bias, (0, packed.out_padded - len(bias)), value=torch.nan)
    expected = x.double() @ dequantize_to(weight, dtype, CPU).double().t() + bias
    actual = fused(x, packed, tiles, padded).double()
    torch.testing.assert_close(
        actual, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * expected.abs().max().item()
    )


def test_parts_without_inputs_add_nothing() -> None:
    packed = pack(make_weight("nf4", 72, 192), DEVICE)
    x = torch.randn(2, 192, generator=torch.Generator().manual_seed(6))
    expected = fused(x, packed, SMALL)
    actual = fused(x, packed, replace(SMALL, split_k=8))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tiles", [SMALL, SPLIT], ids=["whole", "split"])
def test_rows_do_not_depend_on_their_batch_mates(tiles: GemmTiles) -> None:
    packed = pack(make_weight("nf4", 72, 256), DEVICE)
    x = torch.randn(20, 256, generator=torch.Generator().manual_seed(3)).half()
    x[7] = torch.nan
    x[11] = 1000
    together = fused(x, packed, tiles)
    for row in (0, 6, 8, 15, 16, 19):
        assert torch.equal(fused(x[row : row + 1], packed, tiles)[0], together[row])


def test_rows_may_be_parts_of_wider_tensors() -> None:
    packed = pack(make_weight("int8", 72, 128), DEVICE)
    wide = torch.randn(3, 256, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    out = torch.zeros(3, 200, device=DEVICE)
    multiply(wide[:, 64:192], packed, None, out[:, 100:172], torch.empty(0, device=DEVICE), SMALL)
    assert torch.equal(out[:, 100:172].cpu(), fused(wide[:, 64:192].clone(), packed, SMALL))
    assert not out[:, :100].any() and not out[:, 172:].any()


def test_packed_codes_have_no_needless_padding() -> None:
    weight = make_weight("nf4", 128, 256)
    packed = pack(weight, CPU)
    assert packed.words.nbytes == weight.codes.nbytes
    assert packed.nbytes == weight.nbytes + packed.values.nbytes
    assert torch.equal(packed.scales.t(), weight.scales)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("rows", [1, 33, 64, 100, 256])
@pytest.mark.parametrize("format", ["nf4", "int4", "int8"])
def test_tiles_of_a_large_model_multiply_by_the_dense_weight(format: str, rows: int) -> None:
    weight = make_weight(format, 1536, 4096, whole=True)
    dense = dequantize_to(weight, torch.bfloat16, CPU).to(DEVICE)
    x = torch.randn(rows, 4096, generator=torch.Generator().manual_seed(5)).bfloat16()
    expected = (x.to(DEVICE).double() @ dense.double().t()).cpu()
    shape = Shape(format, 1536, 4096)
    tiles = choose(unmeasured(shape, 64, processors=132), rows).tiles
    assert tiles is not None
    actual = fused(x, pack(weight, DEVICE), tiles).double()
    assert (actual - expected).abs().max() < 5e-3 * expected.abs().max()
    unit = torch.eye(4096, dtype=torch.bfloat16)[4096 - rows :]
    assert torch.equal(fused(unit, pack(weight, DEVICE), tiles), dense[:, 4096 - rows :].t().cpu())


# ==== PTX ====


def float_bits(value: float) -> int:
    return struct.unpack("<I", struct.pack("<f", value))[0]


def bits_float(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def bits_of_16(value: float, dtype: torch.dtype) -> int:
    return torch.tensor(value, dtype=dtype).view(torch.int16).item() & 0xFFFF


def permute_bytes(a: int, b: int, selector: int) -> int:
    """Run prmt: select four of the bytes of b and a; bit 3 of a selector spreads the sign."""
    source = (b << 32 | a).to_bytes(8, "little")
    picked = []
    for i in range(4):
        nibble = selector >> (4 * i) & 15
        byte = source[nibble & 7]
        picked.append((0xFF if byte & 0x80 else 0) if nibble & 8 else byte)
    return int.from_bytes(bytes(picked), "little")


def rounded_product(a: int, b: int) -> int:
    product = torch.tensor(bits_float(a)) * torch.tensor(bits_float(b))
    return float_bits(product.item())


INSTRUCTIONS: dict[str, Callable[..., int]] = {
    "and.b32": lambda a, b: a & b,
    "shr.u32": lambda a, b: a >> b,
    "prmt.b32": permute_bytes,
    "or.b32": lambda a, b: a | b,
    "mul.rn.f32": rounded_product,
    "cvt.rn.bf16x2.f32": lambda high, low: (
        bits_of_16(bits_float(high), torch.bfloat16) << 16
        | bits_of_16(bits_float(low), torch.bfloat16)
    ),
    "cvt.rn.f16x2.f32": lambda high, low: (
        bits_of_16(bits_float(high), torch.float16) << 16
        | bits_of_16(bits_float(low), torch.float16)
    ),
}


def run_ptx(text: str, inputs: dict[str, int], outputs: int) -> list[int]:
    """Run PTX; the first output invalidates inputs, as they may share a register."""
    registers = dict(inputs)
    for line in text.strip("{}\n").splitlines():
        if line.startswith(".reg"):
            continue
        name, operands = re.fullmatch(r"(\S+) (.*);", line).groups()  # type: ignore[union-attr]
        target, *sources = operands.split(", ")
        result = INSTRUCTIONS[name](*(operand(s, registers) for s in sources))
        if target.startswith("$"):
            registers = {n: value for n, value in registers.items() if n not in inputs}
        registers[target] = result
    return [registers[f"${i}"] for i in range(outputs)]


def operand(text: str, registers: dict[str, int]) -> int:
    if text in registers:
        return registers[text]
    return int(text[2:], 16) if text.startswith("0f") else int(text, 0)


@pytest.mark.parametrize("scale", [0.0371, -1.7, 3e-39, 0.0])
@pytest.mark.parametrize(
    ("pair_type", "dtype"), [("bf16x2", torch.bfloat16), ("f16x2", torch.float16)]
)
def test_ptx_decodes_every_code_in_every_place(
    pair_type: str, dtype: torch.dtype, scale: float
) -> None:
    table = run_ptx(nf4_lookup.table_ptx(pair_type), {"$8": float_bits(scale)}, 8)
    registers = {f"${5 + i}": value for i, value in enumerate(table)}
    values = (torch.tensor(NF4_VALUES) * torch.tensor(scale)).to(dtype)
    for first in range(16):
        codes = [(first + 5 * place) % 16 for place in range(8)]
        word = sum(code << 4 * place for place, code in enumerate(codes))
        pairs = run_ptx(nf4_lookup.lookup_ptx(), registers | {"$4": word}, 4)
        halves = [pair >> shift & 0xFFFF for pair in pairs for shift in (0, 16)]
        assert halves == [values[c].view(torch.int16).item() & 0xFFFF for c in codes]


def test_words_hold_codes_in_the_order_that_the_ptx_reads() -> None:
    weight = make_weight("nf4", 64, 64)
    word = pack(weight, CPU).words[0, 0, 3, 2].item() & 0xFFFFFFFF
    codes = [word >> 4 * place & 15 for place in range(8)]
    expected = dequantize(weight)[3, 16:24] / weight.scales[3, 0]
    torch.testing.assert_close(torch.tensor(NF4_VALUES)[codes], expected)
