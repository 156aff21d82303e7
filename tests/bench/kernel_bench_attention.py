"""Measures native paged attention against the time to read its keys, and against torch's SDPA.

    python -m tests.bench.kernel_bench_attention [decode | prefill] [--shapes 14/2x64 ...]
        [--contexts 8192] [--requests 1 8] [--threads 2] [--isa avx512] [--block-size 16]
        [--rounds 25] [--cold-mb 96]

SDPA gets contiguous keys in the form that suits it best: a decode's group of heads as queries of
one kv head, a prefill's keys repeated for every head. Every call uses the next of many layers, too
many to fit the caches, as in a step. The variants take turns round by round; a number is the
shortest round, since other load only adds time. GB/s counts each key and value once, in bf16 or
int8 as stored; GFLOP/s counts the keys that a query sees. `floor` is the time of a decode over
that of reading as many bytes, contiguous ones, with the same threads in the same rounds.
"""

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.backends.native import structs
from engine.backends.native.kv import KvLayout
from engine.backends.native.library import FUNCTIONS, Context

Call = Callable[[], object]
ROUND_SECONDS = 0.004  # short enough that some rounds are undisturbed


@dataclass(frozen=True, slots=True)
class Shape:
    heads: int
    kv_heads: int
    head_dim: int

    @staticmethod
    def parse(text: str) -> "Shape":  # "14/2x64"
        heads, rest = text.split("/")
        kv_heads, head_dim = rest.split("x")
        return Shape(int(heads), int(kv_heads), int(head_dim))

    def __str__(self) -> str:
        return f"{self.heads}/{self.kv_heads}x{self.head_dim}"


@dataclass(frozen=True, slots=True)
class Case:
    shape: Shape
    requests: int
    new: int  # queries of each request
    context: int  # keys of each request

    @property
    def kv_elements(self) -> int:
        return 2 * self.requests * self.context * self.shape.kv_heads * self.shape.head_dim

    @property
    def flop(self) -> int:
        seen = sum(range(self.context - self.new + 1, self.context + 1))
        return 4 * self.requests * seen * self.shape.heads * self.shape.head_dim


CONTEXTS = (256, 512, 1024, 2048)
REQUESTS = (1, 8, 16)
SHAPES = tuple(map(Shape.parse, ("14/2x64", "9/3x64", "32/8x64", "32/8x128")))


class Native:
    """Holds the kernel's calls, one per layer."""

    def __init__(
        self, context: Context, case: Case, kv_format: int, block_size: int, layers: int
    ) -> None:
        shape = case.shape
        layout = KvLayout(kv_format, block_size, shape.kv_heads, shape.head_dim)
        per_request = -(-case.context // block_size)
        blocks = layout.allocate(case.requests * per_request, layers)
        blocks.view(torch.bfloat16).normal_()
        if kv_format == structs.KV_INT8:
            heads = blocks.view(*blocks.shape[:2], shape.kv_heads, -1)
            heads[..., -8 * block_size :].view(torch.float32).fill_(1 / 64)
        tables = torch.randperm(blocks.shape[0], dtype=torch.int32).view(case.requests, -1)
        starts = torch.arange(case.requests + 1, dtype=torch.int32) * case.new
        context_lens = torch.full((case.requests,), case.context, dtype=torch.int32)
        q = torch.randn(case.requests * case.new, shape.heads, shape.head_dim).bfloat16()
        out = torch.empty_like(q)
        self._kept = (blocks, tables, starts, context_lens, q, out)
        self._call = context.function("attention", FUNCTIONS["attention"])
        self._args = [
            structs.ReefAttentionArgs(
                kv=layout.layer(blocks, layer),
                requests=structs.ReefRequests(
                    num_requests=case.requests,
                    table_stride=per_request,
                    row_starts=starts.data_ptr(),
                    context_lens=context_lens.data_ptr(),
                    block_tables=tables.data_ptr(),
                ),
                q=q.data_ptr(),
                q_stride=q.stride(0),
                out=out.data_ptr(),
                out_stride=out.stride(0),
                heads=shape.heads,
                scale=shape.head_dim**-0.5,
            )
            for layer in range(layers)
        ]

    def calls(self) -> list[Call]:
        return [lambda args=args: self._call(args) for args in self._args]


def read_calls(nbytes: int, layers: int) -> list[Call]:
    """Read `nbytes` with all of torch's threads."""
    return [lambda part=part: part.sum() for part in torch.ones(layers, nbytes // 4)]


def sdpa_calls(case: Case, layers: int) -> list[Call]:
    shape, scale = case.shape, case.shape.head_dim**-0.5
    group = shape.heads // shape.kv_heads
    kv_shape = (2, case.requests, shape.kv_heads, case.context, shape.head_dim)
    kv = torch.empty(layers, *kv_shape, dtype=torch.bfloat16).normal_()
    if case.new == 1:
        q = torch.randn(case.requests, shape.kv_heads, group, shape.head_dim).bfloat16()
        return [lambda k=k, v=v: sdpa(q, k, v, None, scale) for k, v in kv]
    q = torch.randn(case.requests, shape.heads, case.new, shape.head_dim).bfloat16()
    mask = torch.full((case.new, case.context), -torch.inf, dtype=torch.bfloat16)
    mask = mask.triu(case.context - case.new + 1)
    repeated = [(k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)) for k, v in kv]
    causal = None if case.new == case.context else mask
    return [lambda k=k, v=v: sdpa(q, k, v, causal, scale) for k, v in repeated]


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> None:
    causal = mask is None and q.shape[2] == k.shape[2]
    F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)


def measure(variants: dict[str, list[Call]], rounds: int) -> dict[str, float]:
    """Return the microseconds per call of each, in its shortest round."""
    cycles = {name: itertools.cycle(calls) for name, calls in variants.items()}
    counts = {name: _calls_per_round(cycle) for name, cycle in cycles.items()}
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, cycle in cycles.items():
            taken[name].append(_seconds(cycle, counts[name]) / counts[name] * 1e6)
    return {name: min(times) for name, times in taken.items()}


def _calls_per_round(cycle: Iterator[Call]) -> int:
    _seconds(cycle, 2)
    return max(1, int(ROUND_SECONDS / (_seconds(cycle, 3) / 3)))


def _seconds(cycle: Iterator[Call], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        next(cycle)()
    return time.perf_counter() - start


def bench(context: Context, case: Case, options: argparse.Namespace) -> None:
    layers = max(1, -(-options.cold_mb * 2**20 // (2 * case.kv_elements)))
    natives = {
        name: Native(context, case, kv_format, options.block_size, layers)
        for name, kv_format in (("bf16", structs.KV_BF16), ("int8", structs.KV_INT8))
    }
    variants = {name: native.calls() for name, native in natives.items()}
    variants["sdpa"] = sdpa_calls(case, layers)
    variants["read"] = read_calls(2 * case.kv_elements, layers)
    micros = measure(variants, options.rounds)
    cells = [f"{case.shape!s:>9} {case.requests:3} x {case.new:3} of {case.context:4}"]
    for name, element in (("bf16", 2), ("int8", 1), ("sdpa", 2)):
        rate = case.kv_elements * element / micros[name] / 1e3
        cells.append(f"{micros[name]:9.1f} {rate:6.1f} {case.flop / micros[name] / 1e3:6.0f}")
    cells.append(f"{micros['sdpa'] / micros['bf16']:5.2f}x")
    scaled = (1 + 4 / case.shape.head_dim) / 2  # of int8's bytes, scales included, of bf16's
    floors = micros["bf16"] / micros["read"], micros["int8"] / micros["read"] / scaled
    cells.append(f"{floors[0]:5.2f} {floors[1]:5.2f}")
    print(" | ".join(cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=("decode", "prefill"))
    parser.add_argument("--shapes", type=Shape.parse, nargs="+", default=SHAPES)
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    parser.add_argument("--requests", type=int, nargs="+", default=REQUESTS)
    parser.add_argument("--new", type=int, default=512, help="queries of a prefill")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--isa")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--cold-mb", type=int, default=96)
    options = parser.parse_args()
    context = Context(options.isa, options.threads)
    torch.set_num_threads(context.threads)
    torch.manual_seed(0)
    print(f"{context.isa}, {context.threads} threads, blocks of {options.block_size}")
    print(f"{'requests x queries of keys':>27} | " + 2 * f"{'us  GB/s GFLOP/s':>23} | ", end="")
    print(f"{'SDPA: us  GB/s GFLOP/s':>23} | SDPA / bf16 | floor: bf16 int8")
    for shape in options.shapes:
        if options.kind == "decode":
            both = itertools.product(options.requests, options.contexts)
            cases = [Case(shape, requests, 1, length) for requests, length in both]
        else:
            lengths = [length for length in options.contexts if length >= options.new]
            cases = [Case(shape, 1, options.new, length) for length in lengths]
        for case in cases:
            bench(context, case, options)


if __name__ == "__main__":
    main()
