"""Paged attention of one batch on a CUDA device: its decodes, then its prefill chunks."""

import torch
from torch import Tensor

from engine.kernels.device_positions import DevicePositions
from engine.kernels.triton.attention_decode import (
    choose_num_splits,
    decode_scratch_numel,
    paged_decode,
)
from engine.kernels.triton.attention_prefill import paged_prefill


class TritonAttention:
    """`engine.kernels.dispatch.PagedAttention` over DevicePositions, for one model.

    Holds the scratch of its decodes, which every layer and every CUDA graph of one stream shares:
    at most `max_decodes` requests with one query, and contexts of at most `max_context_len`.
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
    ) -> None:
        self._num_sms = num_sms
        self._max_context_len = max_context_len
        numel = max(
            decode_scratch_numel(
                batch,
                num_heads,
                head_dim,
                choose_num_splits(batch, num_kv_heads, num_sms, max_context_len),
            )
            for batch in range(1, max_decodes + 1)
        )
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
        """q [N, H, D] over each request's own keys -> `out` [N, H, D], new where not given.

        Heads of one row must lie side by side, rows may lie apart. Rows of padding become zeros.
        Launches at most three kernels, with grids that follow from shapes alone.
        """
        out = torch.empty_like(q) if out is None else out
        settings = {"scale": scale, "window": window, "soft_cap": soft_cap}
        num_decodes = positions.num_decodes
        if num_decodes:
            paged_decode(
                q[:num_decodes],
                kv_layer,
                positions.block_tables[:num_decodes],
                positions.context_lens[:num_decodes],
                out[:num_decodes],
                self._scratch,
                num_splits=self._num_splits(num_decodes, kv_layer.shape[3], positions, window),
                **settings,
            )
        if len(positions.tiles):
            paged_prefill(
                q,
                kv_layer,
                positions.block_tables,
                positions.context_lens,
                positions.cu_seqlens_q,
                positions.tiles,
                out,
                tile_tokens=positions.tile_tokens,
                **settings,
            )
        return out

    def _num_splits(
        self, num_decodes: int, kv_heads: int, positions: DevicePositions, window: int | None
    ) -> int:
        longest = positions.max_context_len
        if longest > self._max_context_len:
            raise ValueError(
                f"contexts of {longest}: this attention was made for at most "
                f"{self._max_context_len}"
            )
        keys = longest if window is None else min(longest, window)
        return choose_num_splits(num_decodes, kv_heads, self._num_sms, keys)
