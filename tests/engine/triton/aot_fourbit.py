"""The quantized GEMM as an H200 would run it for Llama-3-8B's q, k and v, for every tile size."""

from typing import Any

from engine.kernels.triton.crossovers import Shape, Tiles, unmeasured
from engine.kernels.triton.dequantize import BLOCKS
from engine.kernels.triton.fourbit import SUM_BLOCK
from tests.engine.triton.aot import AotCase

PROCESSORS = 132
OUT, IN, BLOCK = 6144, 4096, 64
DECODE = {"nf4": "nf4_registers", "int4": "int4", "int8": "int8"}
WEIGHT = {"words_ptr": "*i32", "scales_ptr": "*fp32", "zeros_ptr": "*fp32", "values_ptr": "*fp32"}


def integers(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "i32")


def case(
    kernel: str, name: str, arguments: dict[str, str], constants: dict[str, Any], **options: Any
) -> AotCase:
    """All numbers but that of the rows are multiples of 16, as those of a model's shapes are."""
    return AotCase(
        name=f"fourbit_{name}",
        kernel=f"engine.kernels.triton.{kernel}",
        signature=arguments | dict.fromkeys(constants, "constexpr"),
        constants=constants,
        divisible=tuple(a for a in arguments if a != "rows"),
        **options,
    )


def tiles_for(format: str, rows: int) -> Tiles:
    choices = unmeasured(Shape(format, OUT, IN), IN // BLOCK, PROCESSORS)
    return next(c.tiles for c in choices if c.tiles is not None and c.tiles.rows == rows)


def gemm(format: str, rows: int) -> AotCase:
    tiles = tiles_for(format, rows)
    split = tiles.split_k > 1
    y = {"bias_ptr": "*fp32", "y_ptr": "*fp32" if split else "*bf16"}
    sizes = integers("rows", "out_features", "in_features", "blocks", "out_padded")
    return case(
        "fourbit:gemm_kernel",
        f"{format}_{rows}_rows",
        {"x_ptr": "*bf16"} | WEIGHT | y | sizes | integers("stride_x", "stride_y", "stride_plane"),
        {
            "DECODE": DECODE[format],
            "BM": tiles.rows,
            "BN": tiles.outputs,
            "BK": BLOCK,
            "SPLIT_K": tiles.split_k,
            "GROUP_BLOCKS": {"nf4": 1, "int4": 2, "int8": IN // BLOCK}[format],
            "ONE_GROUP": format == "int8",
            "HAS_BIAS": not split,
            "EVEN_K": True,
            "UPCAST": False,
        },
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        max_registers=128 if rows < 64 else 255,  # 4 programs and more to a processor, or 1
        needs=("wgmma.mma_async", "cp.async.cg.shared.global"),  # .cg: 16 bytes
    )


def dequantize(format: str) -> AotCase:
    return case(
        "dequantize:dequantize_kernel",
        f"{format}_dequantize",
        WEIGHT
        | {"dense_ptr": "*bf16"}
        | integers("out_features", "in_features", "blocks", "out_padded"),
        {
            "DECODE": DECODE[format],
            "BK": BLOCK,
            "GROUP_BLOCKS": 1,
            "BLOCKS": BLOCKS,
            "UPCAST": False,
        },
        needs=("ld.global.v4.b32", "st.global.v4.b32"),
    )


def sum_planes() -> AotCase:
    return case(
        "fourbit:sum_kernel",
        "sum",
        {"planes_ptr": "*fp32", "bias_ptr": "*fp32", "y_ptr": "*bf16"}
        | integers("out_features", "stride_y", "stride_plane"),
        {"PLANES": 8, "HAS_BIAS": True, "BLOCK": SUM_BLOCK, "UPCAST": False},
    )


CASES = [
    *(gemm("nf4", rows) for rows in (16, 32, 64, 128)),
    gemm("int4", 16),
    gemm("int8", 16),
    dequantize("nf4"),
    sum_planes(),
]
