"""NativePicker: chooses and draws tokens with the native CPU kernels, one call for all rows."""

import ctypes as c
from collections.abc import Sequence

import torch
from torch import Tensor

from engine.backends.native import structs
from engine.backends.native.library import Context
from engine.scheduler.batch import ScheduledRequest

_MASK64 = 2**64 - 1


class NativePicker:
    """Draws the same as TorchPicker but for roundings, and equally on every thread and machine.

    Logits are on the CPU, with contiguous rows. Every bit of a result depends on its row alone.
    """

    def __init__(self, context: Context) -> None:
        self._greedy = context.function("greedy", structs.ReefGreedyArgs)
        self._draw = context.function("draw", structs.ReefDrawArgs)

    def best(self, logits: Tensor) -> tuple[list[int], list[float]]:
        rows, vocab = logits.shape
        token_ids, highest = (c.c_int32 * rows)(), (c.c_float * rows)()
        self._greedy(
            structs.ReefGreedyArgs(
                logits=logits.data_ptr(),
                logits_stride=logits.stride(0),
                token_ids=c.addressof(token_ids),
                highest=c.addressof(highest),
                rows=rows,
                vocab=vocab,
            )
        )
        return list(token_ids), list(highest)

    def draw(
        self,
        logits: Tensor,
        rows: list[int],
        requests: Sequence[ScheduledRequest],
        best: list[int],
    ) -> list[int]:
        vocab = logits.shape[1]
        draws = [_draw_of(row, best[row], requests[row], vocab) for row in rows]
        token_ids = (c.c_int32 * len(rows))()
        scratch = torch.empty(len(rows), structs.draw_scratch(max(d.top_k for d in draws)))
        self._draw(
            structs.ReefDrawArgs(
                logits=logits.data_ptr(),
                logits_stride=logits.stride(0),
                draws=(structs.ReefDraw * len(draws))(*draws),
                token_ids=c.addressof(token_ids),
                scratch=scratch.data_ptr(),
                scratch_stride=scratch.shape[1],
                num_draws=len(rows),
                vocab=vocab,
            )
        )
        return list(token_ids)


def _draw_of(row: int, best: int, request: ScheduledRequest, vocab: int) -> structs.ReefDraw:
    sampling = request.sampling
    return structs.ReefDraw(
        row=row,
        best=best,
        seed=(sampling.seed + request.choice) & _MASK64,
        position=request.end,
        temperature=sampling.temperature,
        top_k=sampling.top_k if sampling.top_k < vocab else 0,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
    )
