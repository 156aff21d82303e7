"""Tests WeightOnlyLinear: choice of implementation, shared scratch, and refusals."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.backends.cuda.forward import WARM_UP_ROWS
from engine.backends.cuda.triton import bitsandbytes_gemm
from engine.backends.cuda.triton.crossovers import (
    TABLE,
    Choice,
    GemmTiles,
    Shape,
    choices_for,
    choose,
    unmeasured,
)
from engine.backends.cuda.triton.scratch import Scratch
from engine.backends.cuda.triton.weight_only import WeightOnlyLinear
from engine.model.quantized_weight import QuantizedWeight, dequantize_to, join
from tests.engine.cuda.test_fourbit import CPU, DEVICE, DTYPES, TOLERANCE, make_weight

SPLIT = GemmTiles(16, 64, num_warps=4, num_stages=2, split_k=2)
WHOLE = GemmTiles(32, 64, num_warps=4, num_stages=2)
CHOICES = (Choice(4, "fused", SPLIT), Choice(18, "fused", WHOLE), Choice(None, "dequantize"))
LLAMA_SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def make_layer(
    weight: QuantizedWeight,
    *,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    scratch: Scratch | None = None,
    choices: Sequence[Choice] = CHOICES,
) -> WeightOnlyLinear:
    scratch = scratch or Scratch(DEVICE)
    return WeightOnlyLinear(weight, bias, DEVICE, dtype, scratch, tuple(choices))


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    atol = TOLERANCE[dtype] * max(expected.abs().max().item(), 1)
    actual, expected = actual.double().cpu(), expected.double().cpu()
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE[dtype], atol=atol)


@pytest.mark.parametrize("rows", [0, 1, 4, 18, 30])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_choice_equals_the_dense_layer(dtype: torch.dtype, rows: int) -> None:
    weight = make_weight("int4", 72, 128, order=True)
    bias = normal(72)
    layer = make_layer(weight, bias=bias, dtype=dtype)
    x = normal(rows, 128, seed=1).to(dtype)
    dense = dequantize_to(weight, dtype, CPU).double().to(DEVICE)
    expected = x.double() @ dense.t() + bias.to(dtype).double()
    if rows:
        assert_close(layer(x), expected, dtype)
    assert layer(x).shape == (rows, 72)


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_into_returns_the_tensor_it_filled(format: str) -> None:
    layer = make_layer(make_weight(format, 72, 128))
    x, wide = normal(3, 128), torch.zeros(3, 100, device=DEVICE)
    assert layer.into(x, wide[:, 8:80]).data_ptr() == wide[:, 8:80].data_ptr()
    assert torch.equal(wide[:, 8:80], layer(x))
    assert not wide[:, :8].any() and not wide[:, 80:].any()


def test_joined_weights_multiply_side_by_side() -> None:
    parts = [make_weight("nf4", rows, 128) for rows in (40, 24, 24)]
    x = normal(2, 128)
    expected = torch.cat([make_layer(part)(x) for part in parts], 1)
    assert torch.equal(make_layer(join(parts))(x), expected)


@pytest.mark.parametrize("rows", [2, 20])
def test_the_given_tensors_are_not_kept(rows: int) -> None:
    weight, bias, x = make_weight("int4", 128, 64, order=True), normal(128), normal(rows, 64)
    assert weight.input_order is not None
    weight = replace(weight, input_order=weight.input_order.long())
    layer = make_layer(weight, bias=bias)
    before = layer(x)
    tensors = (weight.codes, weight.scales, weight.zeros, weight.input_order, bias)
    for tensor in tensors:
        assert tensor is not None
        tensor.zero_()
    assert torch.equal(layer(x), before)


def test_nbytes_are_those_of_the_tensors_on_the_device() -> None:
    weight = make_weight("nf4", 128, 256)
    assert make_layer(weight).nbytes == weight.nbytes + 16 * 4  # and the values of the codes
    biased = make_layer(weight, bias=normal(128))
    assert biased.nbytes == weight.nbytes + 16 * 4 + 2 * 128 * 4


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("rows", [3, 18, 40])
def test_a_cuda_graph_replays_every_choice_for_new_inputs(rows: int) -> None:
    layer = make_layer(make_weight("int4", 72, 128, order=True), bias=normal(72))
    x, out, graph = normal(rows, 128), normal(rows, 72), torch.cuda.CUDAGraph()
    layer.into(x, out)
    with torch.cuda.graph(graph):
        layer.into(x, out)
    x.copy_(normal(rows, 128, seed=1))
    graph.replay()
    assert torch.equal(out, layer(x))


# ==== Scratch ====


def test_layers_share_one_scratch_of_the_largest() -> None:
    scratch = Scratch(DEVICE)
    small = make_layer(make_weight("nf4", 64, 64), scratch=scratch)
    large = make_layer(make_weight("int8", 192, 128), scratch=scratch)
    assert scratch.nbytes == 4 * 192 * 128
    x, wide = normal(20, 64), normal(20, 128)
    alone = make_layer(make_weight("nf4", 64, 64))(x)
    large(wide)
    assert torch.equal(small(x), alone)


def test_scratch_in_use_cannot_grow() -> None:
    scratch = Scratch(DEVICE)
    make_layer(make_weight("nf4", 64, 64), scratch=scratch)(normal(1, 64))
    make_layer(make_weight("int8", 64, 64), scratch=scratch)
    with pytest.raises(RuntimeError, match="in use and cannot grow to 32768"):
        make_layer(make_weight("nf4", 128, 64), scratch=scratch)


def test_scratch_gives_only_what_was_reserved() -> None:
    scratch = Scratch(DEVICE)
    scratch.reserve(64)
    assert scratch.take(torch.float32, 4, 4).shape == (4, 4)
    with pytest.raises(ValueError, match="68 bytes of scratch: 64 are reserved"):
        scratch.take(torch.float32, 17)


# ==== Refusals ====


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "fp4"}, "'fp4': allowed are int8, nf4, int4"),
        ({"group_size": 48}, "group_size 48 of 128 inputs"),
        ({"scales": torch.ones(72, 3)}, r"scales \(72, 3\): expected torch.uint8 and \(72, 2\)"),
        ({"codes": torch.zeros(72, 64, dtype=torch.int8)}, "codes torch.int8"),
        ({"zeros": None}, r"zeros None of a weight in int4: expected \(72, 2\)"),
        ({"format": "nf4"}, r"zeros \(72, 2\) of a weight in nf4: expected None"),
        ({"input_order": torch.zeros(128, dtype=torch.int32)}, "no permutation of the 128"),
    ],
)
def test_unsupported_weights_are_refused(change: dict[str, object], message: str) -> None:
    weight = replace(make_weight("int4", 72, 128), **change)
    with pytest.raises(ValueError, match=message):
        make_layer(weight)


def test_bias_and_dtype_are_checked() -> None:
    weight = make_weight("nf4", 72, 128)
    with pytest.raises(ValueError, match=r"bias \(71,\): expected \[72\]"):
        make_layer(weight, bias=normal(71))
    with pytest.raises(ValueError, match=r"dtype torch.float64: allowed are"):
        make_layer(weight, dtype=torch.float64)


def test_x_and_out_are_checked() -> None:
    layer = make_layer(make_weight("nf4", 72, 128))
    x = normal(2, 128)
    with pytest.raises(ValueError, match=r"x torch.float16 \(2, 128\): expected torch.float32"):
        layer(x.half())
    with pytest.raises(ValueError, match=r"x torch.float32 \(2, 64\)"):
        layer(x[:, :64])
    with pytest.raises(ValueError, match="x has strides"):
        layer(normal(128, 2).t())
    with pytest.raises(ValueError, match=r"out torch.float32 \(2, 71\)"):
        layer.into(x, torch.empty(2, 71, device=DEVICE))
    with pytest.raises(ValueError, match="out has strides"):
        layer.into(x, torch.empty(72, 2, device=DEVICE).t())


# ==== Crossovers ====


@pytest.mark.parametrize(("out_features", "in_features"), LLAMA_SHAPES)
def test_unmeasured_choices_cover_every_row_count(out_features: int, in_features: int) -> None:
    shape = Shape("nf4", out_features, in_features)
    choices = unmeasured(shape, in_features // 64, processors=132)
    for rows in (1, 16, 17, 64, 65, 256):
        choice = choose(choices, rows)
        assert choice.tiles is not None
        assert rows <= 2 * choice.tiles.rows, "no weight is decoded more than twice"
        parts = -(-(in_features // 64) // choice.tiles.split_k)
        assert parts >= 8, "a part's pipeline must pay"
    assert choose(choices, 257).implementation == "dequantize"
    few = choose(choices, 1).tiles
    assert few is not None
    assert out_features // few.outputs * few.split_k >= 132, "every processor has a program"


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_a_warm_up_runs_every_unmeasured_choice(format: str) -> None:
    choices = unmeasured(Shape(format, 6144, 4096), 64, processors=132)
    assert {choose(choices, rows) for rows in WARM_UP_ROWS} == set(choices)


def write_table(folder: Path, choices: list[dict[str, object]]) -> Path:
    entry = {"format": "nf4", "out_features": 72, "in_features": 128, "choices": choices}
    path = folder / "table.json"
    path.write_text(json.dumps({"devices": {"a card": [entry]}}))
    return path


def test_measured_choices_are_taken_on_their_device_and_shape_alone(tmp_path: Path) -> None:
    tiles = {"rows": 16, "outputs": 64, "num_warps": 4, "num_stages": 3, "split_k": 2}
    table = write_table(
        tmp_path,
        [
            {"up_to_rows": 4, "implementation": "bitsandbytes"},
            {"up_to_rows": 16, "implementation": "fused", "tiles": tiles},
            {"up_to_rows": None, "implementation": "dequantize"},
        ],
    )
    shape = Shape("nf4", 72, 128)
    choices = choices_for(shape, 2, "a card", 132, table)
    assert choose(choices, 4) == Choice(4, "bitsandbytes")
    assert choose(choices, 5) == Choice(16, "fused", GemmTiles(16, 64, 4, 3, 2))
    assert choose(choices, 17) == Choice(None, "dequantize")
    assert choices_for(shape, 2, "another card", 132, table) == unmeasured(shape, 2, 132)
    other = Shape("int8", 72, 128)
    assert choices_for(other, 2, "a card", 132, table) == unmeasured(other, 2, 132)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ([], "up_to_rows"),
        ([{"up_to_rows": 4, "implementation": "dequantize"}], r"up_to_rows \[4\]"),
        ([{"up_to_rows": None, "implementation": "marlin"}], "'marlin': allowed are fused"),
        ([{"up_to_rows": 4, "implementation": "fused"}], "tiles None"),
        (
            [{"up_to_rows": n, "implementation": "dequantize"} for n in (8, 4, None)],
            r"\[8, 4, None\]: expected rising",
        ),
    ],
)
def test_wrong_tables_are_refused(
    tmp_path: Path, choices: list[dict[str, object]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        choices_for(Shape("nf4", 72, 128), 2, "a card", 132, write_table(tmp_path, choices))


def test_unsupported_tiles_are_refused() -> None:
    with pytest.raises(ValueError, match="rows=24"):
        GemmTiles(24, 64, 4, 3)


def test_table_in_the_package_is_readable() -> None:
    for device, entries in json.loads(Path(TABLE).read_text())["devices"].items():
        for entry in entries:
            shape = Shape(entry["format"], entry["out_features"], entry["in_features"])
            assert choices_for(shape, shape.in_features // 64, device, 132)


# ==== bitsandbytes ====


@pytest.mark.parametrize("dtype", DTYPES)
def test_bitsandbytes_multiplies_by_the_same_weight(dtype: torch.dtype) -> None:
    weight = replace(make_weight("nf4", 72, 128), scales=normal(72, 2).abs().cpu())
    bias = normal(72).to(dtype)
    x = normal(3, 128, seed=1).to(dtype)
    dense = dequantize_to(weight, dtype, CPU).double().to(DEVICE)
    expected = x.double() @ dense.t() + bias.double()
    assert_close(bitsandbytes_gemm.pack(weight, bias, DEVICE)(x), expected, dtype)


def test_without_bitsandbytes_the_next_choice_takes_its_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bitsandbytes_gemm, "takes", lambda weight, device: False)
    weight = make_weight("nf4", 72, 128)
    x = normal(3, 128)
    choices = (Choice(4, "bitsandbytes"), *CHOICES[1:])
    layer = make_layer(weight, choices=choices)
    assert torch.equal(layer(x), make_layer(weight, choices=CHOICES[1:])(x))
    assert layer.nbytes == make_layer(weight).nbytes, "no second copy of the codes"


def test_bitsandbytes_takes_rows_where_it_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bitsandbytes_gemm, "takes", lambda weight, device: True)
    weight = replace(make_weight("nf4", 72, 128), scales=normal(72, 2).abs().cpu())
    x = normal(3, 128)
    layer = make_layer(weight, choices=(Choice(4, "bitsandbytes"), *CHOICES[1:]))
    assert torch.equal(layer(x), bitsandbytes_gemm.pack(weight, None, DEVICE)(x))
    assert layer.nbytes == make_layer(weight).nbytes + weight.codes.nbytes


def test_bitsandbytes_is_for_nf4_on_cuda_alone() -> None:
    cuda = torch.device("cuda")
    assert bitsandbytes_gemm.takes(make_weight("nf4", 8, 64), cuda)
    assert not bitsandbytes_gemm.takes(make_weight("nf4", 8, 64), CPU)
    assert not bitsandbytes_gemm.takes(make_weight("int4", 8, 64), cuda)
    assert not bitsandbytes_gemm.takes(make_weight("nf4", 8, 96, 96), cuda)
