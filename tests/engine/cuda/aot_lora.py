"""Cases for multi-LoRA at the shapes of Llama-3-8B, for decode and prefill batches."""

import torch

from engine.backends.cuda.triton import lora
from engine.backends.cuda.triton.lora_work import SiteKind, WorkShape
from tests.engine.cuda.aot import AotCase

KINDS = (
    SiteKind(4096, (4096, 1024, 1024)),
    SiteKind(4096, (4096,)),
    SiteKind(4096, (14336, 14336)),
    SiteKind(14336, (4096,)),
)
QKV, _, GATE_UP, DOWN = range(4)
DIVISIBLE = ("planes", "arena", "floats", "table", "words")


def shape(max_rows: int) -> WorkShape:
    return WorkShape(KINDS, max_rows, max_adapters=256, max_lora_rank=256, num_processors=132)


def shrink_case(name: str, kind: int, max_rows: int, max_registers: int) -> AotCase:
    work = shape(max_rows)
    constants = lora.shrink_constants(work, kind, 3, torch.bfloat16)
    return AotCase(
        name=f"lora_shrink_{name}",
        kernel="engine.backends.cuda.triton.lora:_shrink_kernel",
        signature={
            "x": "*bf16",
            "arena": "*bf16",
            "planes": "*fp32",
            "table": "*i32",
            "words": "*i32",
            "site": "i32",
            "x_stride": "i32",
            "table_stride": "i32",
            **dict.fromkeys(constants, "constexpr"),
        },
        constants=constants,
        divisible=("x", "x_stride", *DIVISIBLE[:2], *DIVISIBLE[3:]),
        num_warps=work.tiles.shrink.warps,
        num_stages=work.tiles.shrink.stages,
        max_registers=max_registers,
        needs=("cp.async.cg.shared",),
    )


def expand_case(name: str, kind: int, max_rows: int, max_registers: int) -> AotCase:
    work = shape(max_rows)
    constants = lora.expand_constants(work, kind, 3, torch.bfloat16)
    return AotCase(
        name=f"lora_expand_{name}",
        kernel="engine.backends.cuda.triton.lora:_expand_kernel",
        signature={
            "planes": "*fp32",
            "arena": "*bf16",
            "floats": "*fp32",
            "y": "*bf16",
            "table": "*i32",
            "words": "*i32",
            "column_tiles": "*i32",
            "site": "i32",
            "y_stride": "i32",
            "table_stride": "i32",
            **dict.fromkeys(constants, "constexpr"),
        },
        constants=constants,
        divisible=("y", "y_stride", "column_tiles", *DIVISIBLE),
        num_warps=work.tiles.expand.warps,
        num_stages=work.tiles.expand.stages,
        max_registers=max_registers,
        needs=("cp.async.cg.shared",),
    )


CASES = [
    shrink_case("decode_down", DOWN, 256, 128),
    shrink_case("prefill_qkv", QKV, 2048, 168),
    expand_case("decode_qkv", QKV, 256, 160),
    expand_case("prefill_gate_up", GATE_UP, 2048, 168),
]
