"""Computes paged attention of one batch on a CUDA device: decodes, then prefill chunks."""

import torch
from torch import Tensor

from engine.backends.cuda.flashinfer import FlashInferPrefill
from engine.backends.cuda.positions import DevicePositions, prefill_tile_tokens
from engine.backends.cuda.triton.attention_decode import (
    choose_num_splits,
    decode_scratch_numel,
    paged_decode,
)
from engine.backends.cuda.triton.attention_prefill import (
    choose_prefill_splits,
    paged_prefill,
    prefill_scratch_numel,
)


class TritonAttention:
    """`engine.model.ops.PagedAttention` over DevicePositions, for one model.

    Holds the scratch memory of split keys, which all layers and CUDA graphs of one stream share.
    It suffices for `max_decodes` requests with one query each, contexts of `max_context_len` and
    prefill tiles of `prefill_tile_tokens`. With `flashinfer`, prefills that have `prefill_pages`
    are computed by FlashInfer.
    """

    def __init__(
        self,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        max_decodes: int,
        max_context_len: int,
        num_sms: int,
        device: torch.device,
        flashinfer: FlashInferPrefill | None = None,
    ) -> None:
        self._flashinfer = flashinfer
        self._num_sms = num_sms
        self._max_context_len = max_context_len
        limits = (num_kv_heads, num_sms, max_context_len)
        decodes = (
            decode_scratch_numel(n, num_heads, head_dim, choose_num_splits(n, *limits))
            for n in range(1, max_decodes + 1)
        )
        tokens = prefill_tile_tokens(num_heads, num_kv_heads, head_dim)
        shape = (num_heads, num_kv_heads, head_dim, tokens)
        prefills = (
            prefill_scratch_numel(n, *shape, choose_prefill_splits(n, *limits))
            for n in range(1, num_sms + 1)
        )
        numel = max(*decodes, *prefills)
        self._scratch = torch.empty(numel, dtype=torch.float32, device=device)

    def __call__(
        self,
        q: Tensor,
        kv_layer: Tensor,
        positions: DevicePositions,
        *,
        scale: float,
        window: int | None,
        soft_cap: float | None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Attend q [N, H, D] to each request's own keys; returns `out` [N, H, D], new if None.

        Heads of one row must be contiguous, rows may lie apart. Padding rows become zeros.
        Launches at most four kernels, with grids that depend on shapes alone.
        """
        out = torch.empty_like(q) if out is None else out
        settings = {"scale": scale, "window": window, "soft_cap": soft_cap}
        limits = (kv_layer.shape[3], self._num_sms, self._longest(positions, window))
        num_decodes, num_tiles = positions.num_decodes, len(positions.tiles)
        if num_decodes:
            paged_decode(
                q[:num_decodes],
                kv_layer,
                positions.block_tables[:num_decodes],
                positions.context_lens[:num_decodes],
                out[:num_decodes],
                self._scratch,
                num_splits=choose_num_splits(num_decodes, *limits),
                **settings,
            )
        pages = positions.prefill_pages
        if pages is not None and self._flashinfer is not None and self._flashinfer.plan(pages):
            self._flashinfer.run(q[num_decodes:], kv_layer, out[num_decodes:], **settings)
        elif num_tiles:
            paged_prefill(
                q,
                kv_layer,
                positions.block_tables,
                positions.context_lens,
                positions.cu_seqlens_q,
                positions.tiles,
                out,
                self._scratch,
                tile_tokens=positions.tile_tokens,
                num_splits=choose_prefill_splits(num_tiles, *limits),
                **settings,
            )
        return out

    def _longest(self, positions: DevicePositions, window: int | None) -> int:
        """Return the largest number of keys that a query sees. Raises ValueError if too large."""
        longest = positions.max_context_len
        if longest > self._max_context_len:
            raise ValueError(
                f"contexts of {longest}: this attention was made for at most "
                f"{self._max_context_len}"
            )
        return longest if window is None else min(longest, window)
