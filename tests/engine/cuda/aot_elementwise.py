"""Cases for the elementwise kernels, as Llama-3-8B's decoder launches them."""

from dataclasses import replace
from typing import Any

from engine.backends.cuda.triton.embed import BLOCK as EMBED_BLOCK
from engine.backends.cuda.triton.embed import RANKS, WARPS
from engine.backends.cuda.triton.gate import BLOCK
from engine.backends.cuda.triton.launch import block_of, warps_of
from engine.backends.cuda.triton.rotary import head_tiles
from tests.engine.cuda.aot import AotCase

HIDDEN, WIDTH = 4096, 14336
HEADS, KV_HEADS, DIM = 32, 8, 128
ADAPTERS = {"table_ptr": "*i32", "floats_ptr": "*fp32", "words_ptr": "*i32"}  # of rows
KERNELS = "engine.backends.cuda.triton"


def norm(name: str, *, is_sandwich: bool, is_rounded: bool, has_adapters: bool) -> AotCase:
    none = {} if is_sandwich else {"leave_ptr": None}
    none |= {} if is_rounded else {"codes_ptr": None, "scales_ptr": None}
    none |= {} if has_adapters else dict.fromkeys(ADAPTERS)
    types = {
        "x_ptr": "*bf16",
        "delta_ptr": "*bf16",
        "leave_ptr": "*fp32",
        "weight_ptr": "*fp32" if is_sandwich else "*bf16",
        "out_ptr": "*bf16",
        "codes_ptr": "*u8",
        "scales_ptr": "*fp32",
        **ADAPTERS,
        "x_stride": "i32",
        "delta_stride": "i32",
        "out_stride": "i32",
        "table_stride": "i32",
        "place": "i32",
        "leave_place": "i32",
        "scale": "fp32",
        "eps": "fp32",
    }
    block = block_of(HIDDEN)
    constants = none | {"WIDTH": HIDDEN, "BLOCK": block}
    return _case(name, "norm:add_rms_norm_kernel", types, constants, warps_of(block))


def gate(name: str, activation: str, *, is_rounded: bool) -> AotCase:
    none = {} if is_rounded else {"codes_ptr": None, "scales_ptr": None}
    types = {
        "gate_up_ptr": "*bf16",
        "out_ptr": "*bf16",
        "codes_ptr": "*u8",
        "scales_ptr": "*fp32",
        "gate_up_stride": "i32",
        "out_stride": "i32",
    }
    block = block_of(WIDTH) if is_rounded else BLOCK
    constants = none | {"WIDTH": WIDTH, "BLOCK": block, "ACTIVATION": activation}
    return _case(name, "gate:gate_kernel", types, constants, warps_of(block))


def rotary(name: str, *, is_normed: bool, has_adapters: bool) -> AotCase:
    types = {
        "qkv_ptr": "*bf16",
        "cos_ptr": "*fp32",
        "sin_ptr": "*fp32",
        "positions_ptr": "*i64",
        "slots_ptr": "*i64",
        "kv_ptr": "*bf16",
        "q_norm_ptr": "*bf16",
        "k_norm_ptr": "*bf16",
        **ADAPTERS,
        "qkv_stride": "i32",
        "block_stride": "i32",
        "value_stride": "i32",
        "slot_stride": "i32",
        "table_stride": "i32",
        "q_place": "i32",
        "k_place": "i32",
        "eps": "fp32",
    }
    constants = {} if is_normed else {"q_norm_ptr": None, "k_norm_ptr": None}
    constants |= {} if has_adapters else dict.fromkeys(ADAPTERS)
    constants |= head_tiles(HEADS, KV_HEADS, DIM, DIM, 16)[1]
    return _case(name, "rotary:rotate_and_store_kernel", types, constants, num_warps=1)


def embed(name: str) -> AotCase:
    types = {
        "token_ids": "*i32",
        "weight": "*bf16",
        "out": "*bf16",
        "arena": "*bf16",
        "floats": "*fp32",
        "longs": "*i64",
        "table": "*i32",
        "words": "*i32",
        "table_stride": "i32",
        "place": "i32",
        "vocab": "i32",
        "out_stride": "i32",
        "scale": "fp32",
    }
    constants = {"WIDTH": HIDDEN, "UNIT": 128, "BLOCK": EMBED_BLOCK, "RANKS": RANKS}
    case = _case(name, "embed:_embed_kernel", types, constants, WARPS)
    return replace(case, allow_scalar_loads=True)  # of a token's own factors, as many as the rank


def _case(
    name: str, kernel: str, types: dict[str, str], constants: dict[str, Any], num_warps: int
) -> AotCase:
    """Make a case; every pointer and stride of these shapes is a multiple of 16."""
    signature = {key: "constexpr" if key in constants else kind for key, kind in types.items()}
    signature |= dict.fromkeys(constants, "constexpr")
    unspecialized = ("table_stride", "vocab", "place", "leave_place", "q_place", "k_place")
    numbers = [k for k, kind in signature.items() if kind == "i32" and k not in unspecialized]
    whole = [*numbers, *(k for k, kind in signature.items() if kind.startswith("*"))]
    return AotCase(
        name=f"elementwise {name}",
        kernel=f"{KERNELS}.{kernel}",
        signature=signature,
        constants=constants,
        divisible=tuple(whole),
        num_warps=num_warps,
        max_registers=128,
        needs=("ld.global.v4",),
    )


CASES = [
    norm("norm", is_sandwich=False, is_rounded=False, has_adapters=False),
    norm("sandwich norm to fp8", is_sandwich=True, is_rounded=True, has_adapters=True),
    gate("gate", "silu", is_rounded=False),
    gate("gate to fp8", "gelu_tanh", is_rounded=True),
    rotary("rotary", is_normed=False, has_adapters=False),
    rotary("rotary with head norms", is_normed=True, has_adapters=True),
    embed("embed"),
]
