"""Measures the GPU engine's attention.

Decodes are compared with the bytes of keys and values, prefills with other implementations.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from engine.backends.cuda.flashinfer import (
    FlashInferPrefill,
    PrefillShape,
    Scores,
    choose_flashinfer,
)
from engine.backends.cuda.positions import copy_positions, prefill_pages, prefill_tile_tokens
from engine.backends.cuda.triton.attention import TritonAttention
from engine.scheduler.batch import ScheduledRequest
from tests.bench.gpu_clock import Work, graph_s, medians_s, recorded
from tests.bench.gpu_report import Goal, Row, attempt
from tests.bench.gpu_setting import BLOCK_SIZE, Setting, decode_requests

BACKENDS = {
    "FlashAttention": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
}


class Paged:
    """Reef's attention over paged caches of random numbers.

    Decodes have several caches, so that none stays in the device's own cache. `max_context_len` is
    that of a captured graph: it determines how keys are split, for any context.
    """

    def __init__(
        self,
        setting: Setting,
        requests: list[ScheduledRequest],
        context: int,
        max_context_len: int,
    ) -> None:
        shape, self._setting = setting.shape, setting
        num_blocks = len(requests) * len(requests[0].block_table)
        size = (num_blocks, 2, BLOCK_SIZE, shape.num_kv_heads, shape.head_dim)
        self.kv_bytes = 2 * len(requests) * context * shape.num_kv_heads * shape.head_dim
        self.kv_bytes *= setting.dtype.itemsize
        is_decode = len(requests[0].token_ids) == 1
        copies = setting.copies(self.kv_bytes) if is_decode else 1
        self.kv_layers = [setting.noise(*size) for _ in range(copies)]
        tile_tokens = prefill_tile_tokens(shape.num_heads, shape.num_kv_heads, shape.head_dim)
        self._positions = copy_positions(requests, tile_tokens, setting.device, max_context_len)
        self._attention = TritonAttention(
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            max_decodes=len(requests),
            max_context_len=max_context_len,
            num_sms=setting.num_sms,
            device=setting.device,
        )
        num_rows = sum(len(r.token_ids) for r in requests)
        self.q = setting.noise(num_rows, shape.num_heads, shape.head_dim)
        self.out, self.scale = torch.empty_like(self.q), shape.head_dim**-0.5

    @property
    def works(self) -> list[Work]:
        return [partial(self._attend, layer) for layer in self.kv_layers]

    def _attend(self, kv_layer: torch.Tensor) -> object:
        more = {"scale": self.scale, "window": None, "soft_cap": None, "out": self.out}
        return self._attention(self.q, kv_layer, self._positions, **more)


# ==== decodes ====


def decode_attention(setting: Setting) -> Iterator[Row]:
    batches = setting.pick((128, 32, 1, 256), (2,), (2,))
    contexts = setting.pick((1024, 2048, 4096, 8192), (300,), (40,))
    for batch in batches:
        for context in contexts:
            if setting.budget.is_spent:
                return
            if batch * context <= 128 * 8192:
                yield _decode_row(setting, batch, context)


def _decode_row(setting: Setting, batch: int, context: int) -> Row:
    longest = setting.pick(8192, 512, 64)
    paged = Paged(setting, decode_requests(batch, context), context, longest)
    seconds = graph_s(paged.works, setting.device)
    share = paged.kv_bytes / setting.roofline.bytes_per_s / seconds
    return Row(
        f"decode attention, {batch} x {context}",
        seconds * 1e6,
        "us",
        Goal(share, "copy bandwidth", at_least=0.75 if batch == 128 else None, target="5"),
    )


# ==== prefills ====


def prefill_attention(setting: Setting) -> Iterator[Row]:
    """Measure the new tokens of one prompt; after an earlier chunk they attend to that too."""
    cases = setting.pick(
        ((8192, 8192), (2048, 2048), (2048, 8192)), ((512, 512), (512, 1024)), ((20, 20), (20, 40))
    )
    for new, context in cases:
        if setting.budget.is_spent:
            return
        name = f"prefill attention, {new} of {context}"
        yield from attempt(name, _prefill_row(setting, name, new, context), "5")


def _prefill_row(setting: Setting, name: str, new: int, context: int) -> Iterator[Row]:
    requests = decode_requests(1, context, new)
    paged = Paged(setting, requests, context, context)
    works = {"ours": _graph(setting, paged.works[0])}
    works |= _torchs(setting, new, context)
    flashinfer = _flashinfer(setting, paged, requests)
    if flashinfer is not None:
        works["FlashInfer"] = flashinfer
    times = medians_s(works, setting.device, rounds=setting.rounds)
    shape = setting.shape
    flops = 4 * shape.num_heads * shape.head_dim * (new * context - new * (new - 1) / 2)
    others = {who: s for who, s in times.items() if who != "ours"}
    best = min(others, key=lambda who: others[who])
    every = ", ".join(f"{who} {s * 1e3:.3f} ms" for who, s in others.items())
    yield Row(
        name,
        times["ours"] * 1e3,
        "ms",
        Goal(times["ours"] / others[best], f"{best}'s time", at_most=1.3, target="5"),
        note=f"{flops / times['ours'] / 1e12:.0f} TFLOP/s; {every}",
    )


def _graph(setting: Setting, work: Work) -> Work:
    return recorded([work], setting.device)


def _torchs(setting: Setting, new: int, context: int) -> dict[str, Work]:
    """Make torch's attention on contiguous tensors, with key heads repeated for each use."""
    shape = setting.shape
    q = setting.noise(1, shape.num_heads, new, shape.head_dim)
    k, v = (setting.noise(1, shape.num_heads, context, shape.head_dim) for _ in range(2))
    mask = causal_lower_right(new, context) if new < context else None
    plain = partial(F.scaled_dot_product_attention, q, k, v, attn_mask=mask, is_causal=mask is None)
    if setting.device.type != "cuda":
        return {"torch": plain}
    works: dict[str, Work] = {}
    for name, backend in BACKENDS.items():
        if mask is None or name == "FlashAttention":
            work = _by(backend, plain)
            if _runs(name, work):
                works[name] = _graph(setting, work)
    return works or {"torch": plain}


def _by(backend: SDPBackend, work: Callable[[], object]) -> Work:
    def run() -> object:
        with sdpa_kernel(backend):
            return work()

    return run


def _runs(name: str, work: Work) -> bool:
    """Whether a backend runs: it may not support a shape, or not be installed."""
    try:
        work()
        torch.cuda.synchronize()
    except RuntimeError as error:
        print(f"{name} is left out: {' '.join(str(error).split())[:200]}", flush=True)
        return False
    return True


def _flashinfer(setting: Setting, paged: Paged, requests: list[ScheduledRequest]) -> Work | None:
    """Make FlashInfer's attention, planned once, as for all layers of a step."""
    if setting.device.type != "cuda":
        return None
    shape, scores = setting.shape, Scores(paged.scale, None, None)
    made: FlashInferPrefill | None = choose_flashinfer(
        PrefillShape(
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            block_size=BLOCK_SIZE,
            dtype=setting.dtype,
            device=setting.device,
        ),
        {scores},
    )
    if made is None or not made.plan(prefill_pages(requests, BLOCK_SIZE)):
        return None
    out = torch.empty_like(paged.q)
    kv_layer = paged.kv_layers[0]
    return partial(made.run, paged.q, kv_layer, out, scale=paged.scale, window=None, soft_cap=None)
