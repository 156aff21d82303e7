"""Cases for the quantized GEMM, as launched on an H200 for Llama-3-8B's q, k and v."""

from typing import Any

from engine.backends.cuda.triton.crossovers import GemmTiles, Shape, unmeasured
from engine.backends.cuda.triton.dequantize import BLOCKS
from engine.backends.cuda.triton.fourbit import SUM_BLOCK
from engine.backends.cuda.triton.packed_weight import BLOCK, SMALL_BLOCK
from tests.engine.cuda.aot import AotCase

PROCESSORS = 132
OUT, IN = 6144, 4096
DECODE = {"nf4": "nf4_registers", "int4": "int4_whole", "int8": "int8"}
WEIGHT = {"words_ptr": "*i32", "scales_ptr": "*fp32", "zeros_ptr": "*fp32", "values_ptr": "*fp32"}


def integers(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "i32")


def case(
    kernel: str, name: str, arguments: dict[str, str], constants: dict[str, Any], **options: Any
) -> AotCase:
    """Make a case; all sizes but the number of rows are multiples of 16, as in real models."""
    return AotCase(
        name=f"fourbit_{name}",
        kernel=f"engine.backends.cuda.triton.{kernel}",
        signature=arguments | dict.fromkeys(constants, "constexpr"),
        constants=constants,
        divisible=tuple(a for a in arguments if a != "rows"),
        **options,
    )


CHOSEN = tuple(c.tiles for c in unmeasured(Shape("nf4", OUT, IN), IN // BLOCK, PROCESSORS))
FEWER_ROWS = (
    GemmTiles(16, 128, num_warps=4, num_stages=4),
    GemmTiles(32, 64, num_warps=4, num_stages=4),
)


def gemm(format: str, tiles: GemmTiles, block: int = BLOCK) -> AotCase:
    split = tiles.split_k > 1
    y = {"bias_ptr": "*fp32", "y_ptr": "*fp32" if split else "*bf16"}
    sizes = integers("rows", "out_features", "in_features", "blocks", "out_padded")
    return case(
        "fourbit:gemm_kernel",
        f"{format}_{tiles.rows}_rows_of_{block}",
        {"x_ptr": "*bf16"} | WEIGHT | y | sizes | integers("stride_x", "stride_y"),
        {
            "DECODE": DECODE[format],
            "BM": tiles.rows,
            "BN": tiles.outputs,
            "BK": block,
            "SPLIT_K": tiles.split_k,
            "GROUP_BLOCKS": {"nf4": 64, "int4": 128, "int8": IN}[format] // block,
            "ONE_GROUP": format == "int8",
            "HAS_BIAS": not split,
            "EVEN_K": True,
            "UPCAST": False,
        },
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        max_registers=128 if tiles.rows < 64 else 255,
        needs=(
            "wgmma.mma_async" if tiles.rows >= 64 else "mma.sync",
            "cp.async.cg.shared.global",  # always 16 bytes
            *(("cvt.rn.bf16x2.f32",) if format == "nf4" else ()),
        ),
    )


def dequantize_to_fp16() -> AotCase:
    return case(
        "dequantize:dequantize_kernel",
        "nf4_dequantize_to_fp16",
        WEIGHT
        | {"dense_ptr": "*fp16"}
        | integers("out_features", "in_features", "blocks", "out_padded"),
        {
            "DECODE": DECODE["nf4"],
            "BK": BLOCK,
            "GROUP_BLOCKS": 1,
            "BLOCKS": BLOCKS,
            "UPCAST": False,
        },
        needs=("ld.global.v4.b32", "st.global.v4.b32", "cvt.rn.f16x2.f32"),
    )


def sum_planes() -> AotCase:
    return case(
        "fourbit:sum_kernel",
        "sum",
        {"planes_ptr": "*fp32", "bias_ptr": "*fp32", "y_ptr": "*bf16"}
        | integers("out_features", "stride_y"),
        {"PLANES": 8, "HAS_BIAS": True, "BLOCK": SUM_BLOCK, "UPCAST": False},
    )


CASES = [
    *(gemm("nf4", tiles) for tiles in (*CHOSEN, *FEWER_ROWS) if tiles is not None),
    *(gemm(format, tiles) for format in ("int4", "int8") for tiles in CHOSEN[:1] if tiles),
    *(gemm("int4", tiles, SMALL_BLOCK) for tiles in CHOSEN[:1] if tiles),
    dequantize_to_fp16(),
    sum_planes(),
]
