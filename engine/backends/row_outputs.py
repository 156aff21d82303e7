"""Turns a step's tokens and scores into one RowOutput per request."""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from engine.backends.runner import RowOutput
from engine.messages import TokenLogprobs
from engine.scheduler.batch import ScheduledRequest

NOT_FINITE = "the model gave logits that are not finite"
NOT_FINITE_STATES = "the model gave hidden states that are not finite"


def row_outputs(
    requests: Sequence[ScheduledRequest],
    tokens: Iterable[int | None],
    logprobs: Iterable[TokenLogprobs | None],
    prompt_logprobs: Iterable[list[TokenLogprobs]],
    pooled: Iterable[NDArray[np.float64]] = (),
) -> list[RowOutput]:
    """Hand the results to the requests they belong to; all are in the order of the requests.

    `tokens` and `logprobs` have an entry per request that samples: None for a token whose logits
    are not finite, and for logprobs that were not asked for. `prompt_logprobs` has one per request
    with prompt targets, `pooled` one per request with pooled rows.
    """
    outputs = [RowOutput() for _ in requests]
    sampling = [output for output, r in zip(outputs, requests, strict=True) if r.samples]
    for output, token_id, entry in zip(sampling, tokens, logprobs, strict=True):
        if token_id is None:
            output.error = NOT_FINITE
            continue
        output.token_ids = [token_id]
        output.logprobs = None if entry is None else [entry]
    scored = [output for output, r in zip(outputs, requests, strict=True) if r.prompt_targets]
    for output, entries in zip(scored, prompt_logprobs, strict=True):
        output.prompt_logprobs = entries
    pooling = [output for output, r in zip(outputs, requests, strict=True) if r.pooled]
    for output, total in zip(pooling, pooled, strict=True):
        if np.isfinite(total).all():
            output.pooled = total
        else:
            output.error = NOT_FINITE_STATES
    return outputs
