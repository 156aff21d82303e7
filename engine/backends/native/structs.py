"""Mirrors the C structs and enums of src/kernels.h, pack.h and program.h.

The fields of a struct have the order that they have there.
The library compares them with its own when it is loaded (layout.py).
"""

import ctypes as c

BF16, INT8, NF4, NF4_INT8, INT4, INT8_WIDE, INT4_INT8, SHORT_INT8 = range(8)  # ReefFormat
KV_BF16, KV_INT8 = range(2)  # ReefKvFormat
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}  # ReefActivation

pointer, i32, i64, f32 = c.c_void_p, c.c_int32, c.c_int64, c.c_float
u64 = c.c_uint64


class ReefLinear(c.Structure):
    _fields_ = [
        ("format", i32),
        ("in_features", i32),
        ("out_features", i32),
        ("group_size", i32),
        ("packed", pointer),
        ("scales", pointer),
        ("zeros", pointer),
        ("multipliers", pointer),
        ("bias", pointer),
        ("input_order", pointer),
    ]


class ReefLinearArgs(c.Structure):
    _fields_ = [
        ("linear", c.POINTER(ReefLinear)),
        ("x", pointer),
        ("x_stride", i64),
        ("y", pointer),
        ("y_stride", i64),
        ("rows", i32),
        ("y_is_float", i32),
        ("scratch", pointer),
    ]


class ReefLoraSlice(c.Structure):
    _fields_ = [
        ("r0", i32),
        ("r1", i32),
        ("out0", i32),
        ("out1", i32),
        ("b", pointer),
        ("scale", pointer),
        ("shift", pointer),
    ]


class ReefLoraSite(c.Structure):
    _fields_ = [
        ("a", pointer),
        ("slices", c.POINTER(ReefLoraSlice)),
        ("lora_rank", i32),
        ("num_slices", i32),
    ]


class ReefLoraSegment(c.Structure):
    _fields_ = [("sites", c.POINTER(ReefLoraSite)), ("start", i32), ("end", i32)]


class ReefLoraBatch(c.Structure):
    _fields_ = [
        ("segments", c.POINTER(ReefLoraSegment)),
        ("rows", pointer),
        ("num_segments", i32),
        ("max_lora_rank", i32),
    ]


class ReefLoraArgs(c.Structure):
    _fields_ = [
        ("batch", c.POINTER(ReefLoraBatch)),
        ("site", i32),
        ("in_features", i32),
        ("x", pointer),
        ("x_stride", i64),
        ("y", pointer),
        ("y_stride", i64),
        ("h", pointer),
        ("h_stride", i64),
        ("threads", i32),
        ("y_is_float", i32),
    ]


class ReefPlainSlice(c.Structure):
    _fields_ = [("b", pointer), ("r0", i32), ("r1", i32), ("out0", i32), ("out1", i32)]


class ReefPlainSite(c.Structure):
    _fields_ = [
        ("a", pointer),
        ("scale", pointer),
        ("shift", pointer),
        ("slices", c.POINTER(ReefPlainSlice)),
        ("num_slices", i32),
        ("lora_rank", i32),
        ("out_features", i32),
    ]


class ReefPlainArgs(c.Structure):
    _fields_ = [
        ("site", c.POINTER(ReefPlainSite)),
        ("x", pointer),
        ("x_stride", i64),
        ("y", pointer),
        ("y_stride", i64),
        ("h", pointer),
        ("rows", i32),
        ("in_features", i32),
    ]


class ReefPlainLora(c.Structure):
    _fields_ = [("sites", c.POINTER(ReefPlainSite)), ("h", pointer), ("first", i32)]


class ReefKvLayer(c.Structure):
    _fields_ = [
        ("base", pointer),
        ("block_bytes", i64),
        ("format", i32),
        ("block_size", i32),
        ("kv_heads", i32),
        ("head_dim", i32),
    ]


class ReefRequests(c.Structure):
    _fields_ = [
        ("num_requests", i32),
        ("table_stride", i32),
        ("row_starts", pointer),
        ("context_lens", pointer),
        ("block_tables", pointer),
    ]


class ReefStoreArgs(c.Structure):
    _fields_ = [
        ("kv", ReefKvLayer),
        ("qkv", pointer),
        ("qkv_stride", i64),
        ("cos", pointer),
        ("sin", pointer),
        ("positions", pointer),
        ("slot_mapping", pointer),
        ("rows", i32),
        ("heads", i32),
        ("rotary_dim", i32),
    ]


class ReefAttentionArgs(c.Structure):
    _fields_ = [
        ("kv", ReefKvLayer),
        ("requests", ReefRequests),
        ("q", pointer),
        ("q_stride", i64),
        ("out", pointer),
        ("out_stride", i64),
        ("heads", i32),
        ("window", i32),
        ("scale", f32),
        ("soft_cap", f32),
    ]


class ReefEmbedArgs(c.Structure):
    _fields_ = [
        ("table", pointer),
        ("token_ids", pointer),
        ("x", pointer),
        ("x_stride", i64),
        ("scale", f32),
        ("rows", i32),
        ("width", i32),
    ]


class ReefNormArgs(c.Structure):
    _fields_ = [
        ("x", pointer),
        ("x_stride", i64),
        ("delta", pointer),
        ("delta_stride", i64),
        ("y", pointer),
        ("y_stride", i64),
        ("weight", pointer),
        ("delta_scale", f32),
        ("eps", f32),
        ("rows", i32),
        ("width", i32),
        ("groups", i32),
        ("norm", i32),
        ("replaced", pointer),
    ]


class ReefGateArgs(c.Structure):
    _fields_ = [
        ("x", pointer),
        ("x_stride", i64),
        ("y", pointer),
        ("y_stride", i64),
        ("rows", i32),
        ("width", i32),
        ("activation", i32),
    ]


class ReefGatherArgs(c.Structure):
    _fields_ = [
        ("x", pointer),
        ("x_stride", i64),
        ("rows_of_x", pointer),
        ("y", pointer),
        ("y_stride", i64),
        ("rows", i32),
        ("width", i32),
    ]


class ReefGreedyArgs(c.Structure):
    _fields_ = [
        ("logits", pointer),
        ("logits_stride", i64),
        ("token_ids", pointer),
        ("highest", pointer),
        ("rows", i32),
        ("vocab", i32),
    ]


class ReefDraw(c.Structure):
    _fields_ = [
        ("row", i32),
        ("best", i32),
        ("seed", u64),
        ("position", u64),
        ("temperature", f32),
        ("top_k", i32),
        ("top_p", f32),
        ("min_p", f32),
    ]


class ReefDrawArgs(c.Structure):
    _fields_ = [
        ("logits", pointer),
        ("logits_stride", i64),
        ("draws", c.POINTER(ReefDraw)),
        ("token_ids", pointer),
        ("scratch", pointer),
        ("scratch_stride", i64),
        ("num_draws", i32),
        ("vocab", i32),
    ]


class ReefPackArgs(c.Structure):
    _fields_ = [
        ("format", i32),
        ("in_features", i32),
        ("out_features", i32),
        ("group_size", i32),
        ("weight", pointer),
        ("weight_stride", i64),
        ("packed", pointer),
    ]


class ReefOpArgs(c.Union):
    _fields_ = [
        ("embed", ReefEmbedArgs),
        ("norm", ReefNormArgs),
        ("linear", ReefLinearArgs),
        ("store", ReefStoreArgs),
        ("attention", ReefAttentionArgs),
        ("gate", ReefGateArgs),
        ("gather", ReefGatherArgs),
    ]


OP_KINDS = ("embed", "norm", "linear", "store", "attention", "gate", "gather")  # ReefOpKind

ENUMS = {  # by the C name without its prefix, for the comparison with the library
    "Format": {
        "BF16": BF16,
        "INT8": INT8,
        "NF4": NF4,
        "NF4_INT8": NF4_INT8,
        "INT4": INT4,
        "INT8_WIDE": INT8_WIDE,
        "INT4_INT8": INT4_INT8,
        "SHORT_INT8": SHORT_INT8,
    },
    "KvFormat": {"BF16": KV_BF16, "INT8": KV_INT8},
    "Activation": {name.upper(): value for name, value in ACTIVATIONS.items()},
    "OpKind": {name.upper(): value for value, name in enumerate(OP_KINDS)},
}


class ReefOp(c.Structure):
    _anonymous_ = ("args",)
    _fields_ = [
        ("kind", i32),
        ("lora_site", i32),
        ("on_outputs", i32),
        ("lora", ReefLoraArgs),
        ("args", ReefOpArgs),
    ]


class ReefStep(c.Structure):
    _fields_ = [
        ("rows", i32),
        ("num_outputs", i32),
        ("token_ids", pointer),
        ("positions", pointer),
        ("slot_mapping", pointer),
        ("output_rows", pointer),
        ("requests", ReefRequests),
        ("lora", c.POINTER(ReefLoraBatch)),
        ("output_lora", c.POINTER(ReefLoraBatch)),
        ("lora_h", pointer),
        ("lora_h_stride", i64),
        ("norms", pointer),
        ("output_norms", pointer),
        ("plain", ReefPlainLora),
        ("nanoseconds", pointer),
    ]


def draw_scratch(top_k: int) -> int:
    """Return the floats of scratch that each draw of a call needs; `top_k` is the largest one
    below the vocabulary's size, 0 if there is none."""
    return 2 * top_k + 256 if top_k else 0
