"""DeviceSampler: samples tokens on the device that computed the logits; the host never waits.

Results equal those of `sampler.sample`. The sampling parameters of a step go to the device in one
copy; plain greedy requests need none. Tokens stay on the device as the next step's inputs, and are
copied to the host together with flags and log-probabilities.
"""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.backends.cuda.draw import Draw, Draws, draw, noise_keys
from engine.backends.cuda.packed_copies import Upload, Words
from engine.backends.cuda.streams import Device
from engine.backends.runner import TokenMask
from engine.backends.sampler import without_vain_rules
from engine.messages import TokenLogprobs
from engine.scheduler.batch import PENDING, ScheduledRequest


@dataclass(frozen=True, slots=True)
class Sampled:
    """The results of sampling for M requests, on the device."""

    tokens: Tensor  # [M] int32
    is_finite: Tensor  # [M] int32; 0: the logits were NaN or infinite
    scores: Tensor  # [L, 1 + 2 K] int32: `scored`, of the L requests with logprobs


class DeviceSampler:
    def __init__(self, device: Device, draw: Draw = draw) -> None:
        self._draw = draw
        self._upload = Upload(device)

    def sample(
        self,
        requests: Sequence[ScheduledRequest],
        logits: Tensor,
        last_inputs: Tensor,
        allowed: Mapping[int, TokenMask] | None = None,
    ) -> Sampled:
        """Sample one token per row of logits [M, V] float32, which are modified in place.

        `last_inputs` [M] int32: each request's last input token, which replaces a PENDING at the
        end of its history. Rows in `allowed` choose among these tokens alone.
        """
        masks: dict[str, Words] = {}
        if allowed:
            requests, masks = without_vain_rules(requests, allowed), _mask_arrays(allowed)
        arrays = masks | _arrays(requests, logits.shape[1])
        there = dict(zip(arrays, self._upload.send(list(arrays.values())), strict=True))
        if "masked_rows" in there:
            _restrict(logits, there["masked_rows"], there["masks"])
        scored_rows, originals = there.get("scored_rows"), logits
        if scored_rows is not None:
            originals = logits.index_select(0, scored_rows)
        _adjust(logits, there, last_inputs)
        highest, best = logits.max(-1)
        tokens = best.int()
        if "draw_rows" in there:
            draws = _draws(there, requests)
            tokens.index_copy_(0, draws.rows.long(), self._draw(logits, draws, highest, best).int())
        scores = tokens.new_empty(0, 1)
        if scored_rows is not None:
            num_top = max(r.sampling.logprobs or 0 for r in requests)
            scores = scored(originals, tokens.index_select(0, scored_rows), num_top)
        return Sampled(tokens, highest.isfinite().int(), scores)


# ==== log-probabilities ====


def scored(logits: Tensor, tokens: Tensor, num_top: int) -> Tensor:
    """Score tokens [L] int32 by logits [L, V]; return [L, 1 + 2 K] int32: the token's
    log-probability, the K likeliest tokens and theirs; K is num_top, or V if that is less."""
    logprobs = torch.log_softmax(logits, -1)
    own = logprobs.gather(1, tokens.long()[:, None])
    top = logprobs.topk(min(num_top, logits.shape[1]), -1)
    return torch.cat([own.view(torch.int32), top.indices.int(), top.values.view(torch.int32)], 1)


def read_scores(scores: Tensor, num_top: Sequence[int]) -> list[TokenLogprobs]:
    """Read rows of `scored`, on the host; keep the `num_top` that each request asked for."""
    k = scores.shape[1] // 2
    own = scores[:, 0].contiguous().view(torch.float32).tolist()
    ids = scores[:, 1 : 1 + k].tolist()
    values = scores[:, 1 + k :].contiguous().view(torch.float32).tolist()
    return [
        TokenLogprobs(own[i], tuple(zip(ids[i][:count], values[i][:count], strict=True)))
        for i, count in enumerate(num_top)
    ]


# ==== sampling parameters as arrays ====


def _arrays(requests: Sequence[ScheduledRequest], vocab: int) -> dict[str, Words]:
    """Collect the parameters that any request has; lists are concatenated, with their rows."""
    arrays: dict[str, Words] = {}
    numbered = list(enumerate(requests))
    scored_rows = [i for i, r in numbered if r.sampling.logprobs is not None]
    if scored_rows:
        arrays["scored_rows"] = np.array(scored_rows, np.int32)
    allowed = [(i, r.allowed_token_ids) for i, r in numbered if r.allowed_token_ids is not None]
    if allowed:
        arrays["allowed_rows"] = np.array([i for i, _ in allowed], np.int32)
        arrays["allowed_places"] = _places(allowed)
    biases = [(i, r.biases) for i, r in numbered if r.biases is not None]
    if biases:
        arrays["bias_places"] = _places([(i, token_ids) for i, (token_ids, _) in biases])
        arrays["biases"] = np.concatenate([np.array(v, np.float32) for _, (_, v) in biases])
    arrays |= _history_arrays(requests)
    forbidden = [(i, r.forbidden_token_ids) for i, r in numbered if r.forbidden_token_ids]
    if forbidden:
        arrays["forbidden_places"] = _places(forbidden)
    drawn = [(i, r) for i, r in numbered if r.sampling.temperature > 0]
    if drawn:
        arrays |= _draw_arrays(drawn)
    return arrays


def _mask_arrays(allowed: Mapping[int, TokenMask]) -> dict[str, Words]:
    return {
        "masked_rows": np.array(list(allowed), np.int32),
        "masks": np.stack(list(allowed.values())).view(np.int32),
    }


def _history_arrays(requests: Sequence[ScheduledRequest]) -> dict[str, Words]:
    """List tokens to penalize: repetition uses prompt and output, presence and frequency the
    output."""
    seen: list[tuple[int, list[int], tuple[float, ...]]] = []
    said: list[tuple[int, list[int], tuple[float, ...]]] = []
    for i, request in enumerate(requests):
        if request.history is None:
            continue
        sampling, (prompt, output) = request.sampling, request.history
        if request.token_ids[-1] == PENDING:
            output = [*output, PENDING]
        if sampling.repetition_penalty != 1.0:
            seen.append((i, [*prompt, *output], (sampling.repetition_penalty,)))
        if output and (sampling.presence_penalty or sampling.frequency_penalty):
            penalties = (sampling.presence_penalty, sampling.frequency_penalty)
            said.append((i, output, penalties))
    arrays: dict[str, Words] = {}
    for name, entries in (("seen", seen), ("said", said)):
        if entries:
            lengths = [len(ids) for _, ids, _ in entries]
            penalties = np.array([p for *_, p in entries], np.float32)
            arrays[f"{name}_places"] = _places([(i, ids) for i, ids, _ in entries])
            arrays[f"{name}_penalties"] = np.repeat(penalties, lengths, 0).T.copy()
    return arrays


def _places(entries: Sequence[tuple[int, "list[int] | array[int]"]]) -> Words:
    """Turn pairs of (row, its token ids) into [2, N]: each token's row, and the token."""
    rows = np.array([row for row, _ in entries], np.int32)
    ids = [np.array(token_ids, np.int32) for _, token_ids in entries]
    return np.stack([np.repeat(rows, [len(each) for each in ids]), np.concatenate(ids)])


def _draw_arrays(drawn: list[tuple[int, ScheduledRequest]]) -> dict[str, Words]:
    params = [r.sampling for _, r in drawn]
    low, high = noise_keys(
        [r.sampling.seed + r.choice for _, r in drawn], [r.end for _, r in drawn]
    )
    return {
        "draw_rows": np.array([i for i, _ in drawn], np.int32),
        "temperature": np.array([p.temperature for p in params], np.float32),
        "top_k": np.array([p.top_k for p in params], np.int32),
        "top_p": np.array([p.top_p for p in params], np.float32),
        "min_p": np.array([p.min_p for p in params], np.float32),
        "key_low": low,
        "key_high": high,
    }


def _draws(there: dict[str, Tensor], requests: Sequence[ScheduledRequest]) -> Draws:
    params = [r.sampling for r in requests if r.sampling.temperature > 0]
    return Draws(
        rows=there["draw_rows"],
        temperature=there["temperature"],
        top_k=there["top_k"],
        top_p=there["top_p"],
        min_p=there["min_p"],
        key_low=there["key_low"],
        key_high=there["key_high"],
        has_filters=any(p.top_k or p.top_p < 1 or p.min_p for p in params),
    )


# ==== changes to the logits ====


def _restrict(logits: Tensor, rows: Tensor, masks: Tensor) -> None:
    """Set the logits of tokens without a bit in masks [R, W] to -inf, in these rows [R]. An id that
    only an adapter has is in no mask."""
    bits = (masks[:, :, None] >> torch.arange(32, dtype=torch.int32, device=masks.device)) & 1
    is_masked = bits.view(len(rows), -1)[:, : logits.shape[1]] == 0
    is_masked = F.pad(is_masked, (0, logits.shape[1] - is_masked.shape[1]), value=True)
    logits.index_copy_(
        0, rows.long(), logits.index_select(0, rows).masked_fill_(is_masked, -torch.inf)
    )


def _adjust(logits: Tensor, there: dict[str, Tensor], last_inputs: Tensor) -> None:
    """Leave the allowed tokens; apply biases, then penalties, then forbidden tokens. A token that
    is listed twice is written twice, with the same value."""
    if "allowed_places" in there:
        flat, places = _flat(logits, there["allowed_places"], last_inputs)
        values = flat[places]
        logits.index_fill_(0, there["allowed_rows"].long(), -torch.inf)
        flat[places] = values
    if "bias_places" in there:
        flat, places = _flat(logits, there["bias_places"], last_inputs)
        flat[places] = flat[places] + there["biases"]
    if "seen_places" in there:
        flat, places = _flat(logits, there["seen_places"], last_inputs)
        values, penalty = flat[places], there["seen_penalties"][0]
        flat[places] = torch.where(values > 0, values / penalty, values * penalty)
    if "said_places" in there:
        flat, places = _flat(logits, there["said_places"], last_inputs)
        presence, frequency = there["said_penalties"]
        counts = torch.zeros_like(flat, dtype=torch.int32)
        counts.scatter_add_(0, places, torch.ones_like(places, dtype=torch.int32))
        flat[places] = flat[places] - (presence + frequency * counts[places])
    if "forbidden_places" in there:
        flat, places = _flat(logits, there["forbidden_places"], last_inputs)
        flat.index_fill_(0, places, -torch.inf)


def _flat(logits: Tensor, places: Tensor, last_inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Flatten the logits to one row; return it and each (row, token id)'s index in it. PENDING is
    replaced by the last input."""
    rows, ids = places
    ids = torch.where(ids == PENDING, last_inputs.index_select(0, rows), ids)
    return logits.view(-1), rows.long() * logits.shape[1] + ids
