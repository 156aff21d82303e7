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
    tokens: Iterable[Sequence[int | None]],
    logprobs: Iterable[Sequence[TokenLogprobs | None]],
    prompt_logprobs: Iterable[list[TokenLogprobs]],
    pooled: Iterable[NDArray[np.float64]] = (),
) -> list[RowOutput]:
    """Hand the results to the requests they belong to; all are in the order of the requests.

    `tokens` and `logprobs` have an entry per request that samples, with those of each row that a
    token was sampled at, and of tokens that must follow: None for a token whose logits are not
    finite, and for logprobs that were not asked for, of which there may be none. `prompt_logprobs`
    has one per request with prompt targets, `pooled` one per request with pooled rows.
    """
    outputs = [RowOutput([]) for _ in requests]
    sampling = [(o, r) for o, r in zip(outputs, requests, strict=True) if r.samples]
    for (output, request), sampled, entries in zip(sampling, tokens, logprobs, strict=True):
        right = sampled[: _num_right(request, sampled)] if request.num_drafts else sampled
        _take_tokens(output, right, entries)
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


def _num_right(request: ScheduledRequest, sampled: Sequence[int | None]) -> int:
    """Count the tokens up to the first that is not the guess that follows it, or the last."""
    drafts, last = request.token_ids[-request.num_drafts :], len(sampled) - 1
    return 1 + next((i for i in range(last) if sampled[i] != drafts[i]), last)


def _take_tokens(
    output: RowOutput, sampled: Sequence[int | None], logprobs: Sequence[TokenLogprobs | None]
) -> None:
    """Take the tokens up to one that is not finite: it fails the step in which it comes first."""
    for token_id in sampled:
        if token_id is None:
            break
        output.token_ids.append(token_id)
    if not output.token_ids:
        output.error = NOT_FINITE
        return
    if logprobs:
        entries = [entry for entry in logprobs[: len(output.token_ids)] if entry is not None]
        output.logprobs = entries or None
