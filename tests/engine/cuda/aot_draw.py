"""Cases for the drawing kernels, with logits of Llama-3-8B, whose rows are 128256 wide."""

from engine.backends.cuda.triton import draw
from tests.engine.cuda.aot import AotCase

KERNELS = "engine.backends.cuda.triton.draw"
ROWS = {"logits": "*fp32", "rows": "*i32", "temperature": "*fp32"}
SIZES = {"logits_stride": "i32", "vocab": "i32"}

FLOORS = AotCase(
    name="draw floors",
    kernel=f"{KERNELS}:_floors_kernel",
    signature={
        **ROWS,
        "top_k": "*i32",
        "top_p": "*fp32",
        "floor": "*fp32",
        **SIZES,
        "BLOCK": "constexpr",
    },
    constants={"BLOCK": draw.FLOOR_BLOCK},
    divisible=("logits", "logits_stride", "vocab"),
    num_warps=draw.FLOOR_WARPS,
    max_registers=128,
)
DRAW = AotCase(
    name="draw tokens",
    kernel=f"{KERNELS}:_draw_kernel",
    signature={
        **ROWS,
        "floor": "*fp32",
        "key_low": "*i32",
        "key_high": "*i32",
        "best": "*fp32",
        "token_ids": "*i32",
        **SIZES,
        "num_parts": "i32",
        **dict.fromkeys(("PART", "BLOCK", "IS_INTERPRETED"), "constexpr"),
    },
    constants={"PART": draw.DRAW_PART, "BLOCK": draw.DRAW_BLOCK, "IS_INTERPRETED": False},
    divisible=("logits", "logits_stride", "vocab"),
    num_warps=draw.DRAW_WARPS,
    max_registers=96,
    needs=("ld.global.v4",),
)
CASES = [FLOORS, DRAW]
