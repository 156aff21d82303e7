"""Cases for paged attention, as its launchers specialize it for real models."""

from typing import Any

import torch

from engine.backends.cuda.positions import prefill_tile_tokens
from engine.backends.cuda.triton import attention_decode, attention_prefill
from tests.engine.cuda.aot import AotCase

TENSORS = {"q": "*bf16", "kv": "*bf16", "block_tables": "*i32", "context_lens": "*i32"}
STRIDES = {"q_stride": "i32", "out_stride": "i32", "block_stride": "i32", "table_stride": "i32"}
PARTIALS = {"partials": "*fp32", "log_sums": "*fp32"}
DECODE = {**TENSORS, "out": "*bf16", **PARTIALS, **STRIDES, "num_splits": "i32"}
PREFILL = {
    **TENSORS,
    "cu_seqlens_q": "*i32",
    "tiles": "*i32",
    "out": "*bf16",
    **PARTIALS,
    **STRIDES,
    "num_splits": "i32",
}
RESULTS = {"out": "*bf16", **PARTIALS, "out_stride": "i32", "num_splits": "i32"}
COMBINE_DECODE = {"context_lens": "*i32", **RESULTS}
COMBINE_PREFILL = {"context_lens": "*i32", "cu_seqlens_q": "*i32", "tiles": "*i32", **RESULTS}
UNALIGNED = ("table_stride", "num_splits")
PLAIN = {"SCALE": 0.125, "SOFT_CAP": 0.0}
CAPPED = {"SCALE": 0.0625, "SOFT_CAP": 50.0}


def _case(
    name: str, kernel: str, arguments: dict[str, str], constants: dict[str, Any], **budget: Any
) -> AotCase:
    return AotCase(
        name=f"attention {name}",
        kernel=f"engine.backends.cuda.triton.{kernel}",
        signature={**arguments, **dict.fromkeys(constants, "constexpr")},
        constants=constants,
        divisible=tuple(a for a in arguments if a not in UNALIGNED),
        **budget,
    )


def _decode(
    name: str, shape: tuple[int, int, int], *, window: int | None = None, **scores: Any
) -> AotCase:
    constants = attention_decode.decode_constants(*shape, 16, torch.bfloat16, window)
    return _case(
        f"decode {name}",
        "attention_decode:_decode",
        DECODE,
        {**constants, **PLAIN, "SPLIT": True, **scores, "UPCAST": False},
        num_warps=attention_decode.NUM_WARPS,
        num_stages=attention_decode.NUM_STAGES,
        needs=("cp.async.cg", "mma.sync"),
    )


def _prefill(
    name: str, shape: tuple[int, int, int], *, window: int | None = None, **scores: Any
) -> AotCase:
    tokens = prefill_tile_tokens(*shape)
    constants = attention_prefill.prefill_constants(*shape, 16, torch.bfloat16, tokens, window)
    return _case(
        f"prefill {name}",
        "attention_prefill:_prefill",
        PREFILL,
        {**constants, **PLAIN, "SPLIT": False, **scores, "UPCAST": False},
        **attention_prefill.prefill_options(constants),
        needs=("cp.async.cg", "wgmma"),
    )


# H, H_kv, D
LLAMA_3_8B, QWEN_2_5_HALF_B, GEMMA_2_9B = (32, 8, 128), (14, 2, 64), (16, 8, 256)
PHI_3_MINI = (32, 32, 96)  # not a power of two

CASES = [
    _decode("llama-3-8b", LLAMA_3_8B),
    _decode("qwen2.5-0.5b", QWEN_2_5_HALF_B, SPLIT=False),
    _decode("gemma-2-9b", GEMMA_2_9B, window=4096, **CAPPED),
    _decode("phi-3-mini", PHI_3_MINI, window=2047),
    _case(
        "combine decode",
        "attention_decode:_combine",
        COMBINE_DECODE,
        attention_decode.combine_constants(
            attention_decode.decode_constants(*LLAMA_3_8B, 16, torch.bfloat16, None)
        ),
    ),
    _prefill("llama-3-8b", LLAMA_3_8B),
    _prefill("qwen2.5-0.5b", QWEN_2_5_HALF_B),
    _prefill("gemma-2-9b", GEMMA_2_9B, window=4096, SPLIT=True, **CAPPED),
    _prefill("phi-3-mini", PHI_3_MINI),
    _case(
        "combine prefill",
        "attention_prefill:_combine",
        COMBINE_PREFILL,
        attention_prefill.combine_constants(
            attention_prefill.prefill_constants(*LLAMA_3_8B, 16, torch.bfloat16, 32, None)
        ),
    ),
]
