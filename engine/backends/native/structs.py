"""Mirrors the C structs of src/kernels.h, pack.h and program.h, field by field in the same order.

The library compares them with its own when it is loaded (layout.py).
"""

import ctypes as c

BF16, INT8, NF4, NF4_INT8, INT4 = range(5)  # ReefFormat
KV_BF16, KV_INT8 = range(2)  # ReefKvFormat
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}  # ReefActivation

pointer, i32, i64, f32 = c.c_void_p, c.c_int32, c.c_int64, c.c_float
u64 = c.c_uint64


class Linear(c.Structure):
    _fields_ = [
        ("format", i32),
        ("in_features", i32),
        ("out_features", i32),
        ("group_size", i32),
        ("packed", pointer),
        ("scales", pointer),
        ("zeros", pointer),
        ("bias", pointer),
        ("input_order", pointer),
    ]


class LinearArgs(c.Structure):
    _fields_ = [
        ("linear", c.POINTER(Linear)),
        ("x", pointer),
        ("x_stride", i64),
        ("y", pointer),
        ("y_stride", i64),
        ("rows", i32),
        ("y_is_float", i32),
        ("scratch", pointer),
    ]


class LoraSlice(c.Structure):
    _fields_ = [("r0", i32), ("r1", i32), ("out0", i32), ("out1", i32), ("b", pointer)]


class LoraSite(c.Structure):
    _fields_ = [
        ("a", pointer),
        ("slices", c.POINTER(LoraSlice)),
        ("lora_rank", i32),
        ("num_slices", i32),
    ]


class LoraSegment(c.Structure):
    _fields_ = [("sites", c.POINTER(LoraSite)), ("start", i32), ("end", i32)]


class LoraBatch(c.Structure):
    _fields_ = [
        ("segments", c.POINTER(LoraSegment)),
        ("rows", pointer),
        ("num_segments", i32),
        ("max_lora_rank", i32),
    ]


class LoraArgs(c.Structure):
    _fields_ = [
        ("batch", c.POINTER(LoraBatch)),
        ("site", i32),
        ("in_features", i32),
        ("x", pointer),
        ("x_stride", i64),
        ("y", pointer),
        ("y_stride", i64),
        ("h", pointer),
        ("h_stride", i64),
        ("threads", i32),
    ]


class KvLayer(c.Structure):
    _fields_ = [
        ("base", pointer),
        ("block_bytes", i64),
        ("format", i32),
        ("block_size", i32),
        ("kv_heads", i32),
        ("head_dim", i32),
    ]


class Requests(c.Structure):
    _fields_ = [
        ("num_requests", i32),
        ("table_stride", i32),
        ("row_starts", pointer),
        ("context_lens", pointer),
        ("block_tables", pointer),
    ]


class StoreArgs(c.Structure):
    _fields_ = [
        ("kv", KvLayer),
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


class AttentionArgs(c.Structure):
    _fields_ = [
        ("kv", KvLayer),
        ("requests", Requests),
        ("q", pointer),
        ("q_stride", i64),
        ("out", pointer),
        ("out_stride", i64),
        ("heads", i32),
        ("window", i32),
        ("scale", f32),
        ("soft_cap", f32),
    ]


class EmbedArgs(c.Structure):
    _fields_ = [
        ("table", pointer),
        ("token_ids", pointer),
        ("x", pointer),
        ("x_stride", i64),
        ("scale", f32),
        ("rows", i32),
        ("width", i32),
    ]


class NormArgs(c.Structure):
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
    ]


class GateArgs(c.Structure):
    _fields_ = [
        ("x", pointer),
        ("x_stride", i64),
        ("y", pointer),
        ("y_stride", i64),
        ("rows", i32),
        ("width", i32),
        ("activation", i32),
    ]


class GatherArgs(c.Structure):
    _fields_ = [
        ("x", pointer),
        ("x_stride", i64),
        ("rows_of_x", pointer),
        ("y", pointer),
        ("y_stride", i64),
        ("rows", i32),
        ("width", i32),
    ]


class GreedyArgs(c.Structure):
    _fields_ = [
        ("logits", pointer),
        ("logits_stride", i64),
        ("token_ids", pointer),
        ("highest", pointer),
        ("rows", i32),
        ("vocab", i32),
    ]


class Draw(c.Structure):
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


class DrawArgs(c.Structure):
    _fields_ = [
        ("logits", pointer),
        ("logits_stride", i64),
        ("draws", c.POINTER(Draw)),
        ("token_ids", pointer),
        ("scratch", pointer),
        ("scratch_stride", i64),
        ("num_draws", i32),
        ("vocab", i32),
    ]


class PackArgs(c.Structure):
    _fields_ = [
        ("format", i32),
        ("in_features", i32),
        ("out_features", i32),
        ("group_size", i32),
        ("weight", pointer),
        ("weight_stride", i64),
        ("packed", pointer),
    ]


class OpArgs(c.Union):
    _fields_ = [
        ("embed", EmbedArgs),
        ("norm", NormArgs),
        ("linear", LinearArgs),
        ("store", StoreArgs),
        ("attention", AttentionArgs),
        ("gate", GateArgs),
        ("gather", GatherArgs),
    ]


OP_KINDS = ("embed", "norm", "linear", "store", "attention", "gate", "gather")  # ReefOpKind


class Op(c.Structure):
    _anonymous_ = ("args",)
    _fields_ = [
        ("kind", i32),
        ("lora_site", i32),
        ("on_outputs", i32),
        ("lora", LoraArgs),
        ("args", OpArgs),
    ]


class Step(c.Structure):
    _fields_ = [
        ("rows", i32),
        ("num_outputs", i32),
        ("token_ids", pointer),
        ("positions", pointer),
        ("slot_mapping", pointer),
        ("output_rows", pointer),
        ("requests", Requests),
        ("lora", c.POINTER(LoraBatch)),
        ("output_lora", c.POINTER(LoraBatch)),
        ("lora_h", pointer),
        ("lora_h_stride", i64),
        ("nanoseconds", pointer),
    ]


def draw_scratch(top_k: int) -> int:
    """Return the floats of scratch that each draw of a call needs; `top_k` is the largest one
    below the vocabulary's size, 0 if there is none."""
    return 2 * top_k + 256 if top_k else 0
