"""Samples token ids from logits, each row by its own SamplingParams.

Random numbers are a function of (seed + choice index, position, token id) alone:
a token is the argmax of log-probability plus Gumbel noise from a counter-based hash (the Gumbel-max
trick; Yellott 1977), so a request draws the same tokens in any batch, on any replica and after
it was interrupted and resumed.
"""

import math
from array import array
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch

from engine.backends.runner import TokenMask
from engine.scheduler.batch import ScheduledRequest
from engine.scheduler.request import SamplingParams
from engine.scheduler.token_rules import NO_TOKENS

NOISE_BITS = 23  # (n + 0.5) / 2**23 is exact in float32 and never 0 or 1
MAX_NOISE = 16.7  # above -log(-log(1 - 2**-24)), the largest value that can be drawn
TOP_P_CANDIDATES = 1024  # likeliest tokens to try before the whole vocabulary is sorted
TOP_FOLD = 32  # logits per group; only groups with the largest maxima are searched


class SampledToken(NamedTuple):
    """A chosen token; `logprob` and `top` are None unless the request asked for them."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Picker(Protocol):
    """Chooses tokens from rows of logits [B, V] float32, each row on its own."""

    def best(self, logits: torch.Tensor) -> tuple[list[int], list[float]]:
        """Return, for each row, a token of its largest logit and that logit; NaN if any is NaN."""
        ...

    def draw(
        self,
        logits: torch.Tensor,
        rows: list[int],
        requests: Sequence[ScheduledRequest],
        best: list[int],
    ) -> list[int]:
        """Draw a token for each of `rows`, whose temperature is above 0 and whose largest logit is
        finite. `requests` and `best` (the result of `best`) are those of all B rows."""
        ...


class TorchPicker:
    """Runs on any device; takes a few ms per row on one CPU core if the vocabulary is large."""

    def best(self, logits: torch.Tensor) -> tuple[list[int], list[float]]:
        highest, token_ids = logits.max(dim=-1)
        return token_ids.tolist(), highest.tolist()

    def draw(
        self,
        logits: torch.Tensor,
        rows: list[int],
        requests: Sequence[ScheduledRequest],
        best: list[int],
    ) -> list[int]:
        return [_draw(logits[i], requests[i], best[i]) for i in rows]


class NotFinite:
    """Replaces a token if the row's logits are NaN or infinite. Only that request ends."""


def sample(
    requests: Sequence[ScheduledRequest],
    logits: torch.Tensor,
    picker: Picker | None = None,
    allowed: Mapping[int, TokenMask] | None = None,
) -> list[SampledToken | NotFinite]:
    """Choose one token per row of logits [B, V] float32, which are modified in place.

    Rows in `allowed` choose among these tokens alone, of which also their log-probabilities are.
    """
    picker = picker or TorchPicker()
    if allowed:
        requests = without_vain_rules(requests, allowed)
        for i, mask in allowed.items():
            _restrict(logits[i], mask)
    originals = {
        i: _adjust(logits[i], request)
        for i, request in enumerate(requests)
        if _is_adjusted(request) or request.sampling.logprobs is not None
    }
    token_ids, highest = picker.best(logits)
    drawn = [
        i
        for i, request in enumerate(requests)
        if request.sampling.temperature > 0 and math.isfinite(highest[i])
    ]
    if drawn:
        tokens = picker.draw(logits, drawn, requests, token_ids)
        for i, token_id in zip(drawn, tokens, strict=True):
            token_ids[i] = token_id
    sampled: list[SampledToken | NotFinite] = [
        SampledToken(token_id) if math.isfinite(largest) else NotFinite()
        for token_id, largest in zip(token_ids, highest, strict=True)
    ]
    for i, original in originals.items():
        num_top = requests[i].sampling.logprobs
        if num_top is not None and math.isfinite(highest[i]):
            sampled[i] = _with_logprobs(token_ids[i], original, num_top)
    return sampled


def target_logprobs(
    logits: torch.Tensor, targets: list[int], num_top: int
) -> list[tuple[float, tuple[tuple[int, float], ...]]]:
    """Return, per row of logits [M, V], the target's logprob and the `num_top` likeliest tokens."""
    rows = torch.log_softmax(logits.float(), dim=-1)
    return [_pick(row, target, num_top) for row, target in zip(rows, targets, strict=True)]


def certain(token_id: int, num_top: int | None, vocab_size: int) -> SampledToken:
    """Return what `sample` gives where a mask allows this token alone, whatever the logits are."""
    if num_top is None:
        return SampledToken(token_id)
    row = torch.full((vocab_size,), -torch.inf)
    row[token_id] = 0.0
    return SampledToken(token_id, *_pick(row, token_id, num_top))


def target_ranks(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return, per row of logits [M, V], how many tokens are likelier than its target, plus 1."""
    own = logits.gather(1, targets.long()[:, None])
    return (logits > own).sum(-1) + 1


def _with_logprobs(token_id: int, logits: torch.Tensor, num_top: int) -> SampledToken:
    logprob, top = _pick(torch.log_softmax(logits, dim=-1), token_id, num_top)
    return SampledToken(token_id, logprob, top)


def _pick(
    logprobs: torch.Tensor, token_id: int, num_top: int
) -> tuple[float, tuple[tuple[int, float], ...]]:
    values, ids = _largest(logprobs, min(num_top, logprobs.numel()))
    return float(logprobs[token_id]), tuple(zip(ids.tolist(), values.tolist(), strict=True))


def _largest(row: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute row.topk(k), in a fifth of the time if the vocabulary is large.

    The k largest lie in the k columns with the largest maxima of the row folded into TOP_FOLD
    lines, or among the values left over by the fold.
    """
    width = row.numel() // TOP_FOLD
    if k == 0 or width <= TOP_FOLD * k:
        return row.topk(k)
    folded = row[: TOP_FOLD * width].view(TOP_FOLD, width)
    columns = folded.amax(0).topk(k).indices
    lines = torch.arange(TOP_FOLD, device=row.device) * width
    rest = torch.arange(TOP_FOLD * width, row.numel(), device=row.device)
    ids = torch.cat([(columns + lines[:, None]).flatten(), rest])
    values, places = row[ids].topk(k)
    return values, ids[places]


# ==== changes to the logits ====


def without_vain_rules(
    requests: Sequence[ScheduledRequest], allowed: Mapping[int, TokenMask]
) -> list[ScheduledRequest]:
    """Let rows sample the end tokens that min_tokens forbids, where no other token is allowed."""
    return [
        request._replace(forbidden_token_ids=NO_TOKENS)
        if request.forbidden_token_ids and i in allowed and _is_vain(request, allowed[i])
        else request
        for i, request in enumerate(requests)
    ]


def _is_vain(request: ScheduledRequest, mask: TokenMask) -> bool:
    rest, token_ids = mask.copy(), np.array(request.forbidden_token_ids, dtype=np.int64)
    token_ids = token_ids[token_ids < 32 * len(mask)]  # no mask allows what only an adapter has
    bits = np.left_shift(np.uint32(1), (token_ids % 32).astype(np.uint32))
    np.bitwise_and.at(rest, token_ids // 32, ~bits)
    return not rest.any()


def _restrict(row: torch.Tensor, mask: TokenMask) -> None:
    """Set the logits of all other tokens to -inf, in place."""
    bits = np.unpackbits(mask.view(np.uint8), count=len(row), bitorder="little")
    row.masked_fill_(torch.from_numpy(bits == 0).to(row.device), -torch.inf)


def _is_adjusted(request: ScheduledRequest) -> bool:
    allowed, forbidden = request.allowed_token_ids, request.forbidden_token_ids
    return bool(request.biases or request.history or forbidden or allowed)


def _adjust(row: torch.Tensor, request: ScheduledRequest) -> torch.Tensor:
    """Change the row in place. Returns the original values, which logprobs are computed from."""
    sampling, forbidden = request.sampling, request.forbidden_token_ids
    allowed = request.allowed_token_ids
    if not _is_adjusted(request):
        return row
    original = row if sampling.logprobs is None else row.clone()
    if allowed is not None:
        ids = _token_ids(allowed, row.device)
        values = row[ids]
        row.fill_(-torch.inf)
        row[ids] = values
    if request.biases is not None:
        ids, values = request.biases
        biases = torch.from_numpy(np.array(values, dtype=np.float32)).to(row.device)
        row.index_add_(0, _token_ids(ids, row.device), biases)
    if request.history is not None:
        _penalize(row, *request.history, sampling)
    if forbidden:
        row.index_fill_(0, _token_ids(forbidden, row.device), -torch.inf)
    return original


def _penalize(
    row: torch.Tensor, prompt: list[int], output: list[int], sampling: SamplingParams
) -> None:
    """Apply penalties: repetition (Keskar et al. 2019) to tokens of prompt and output, presence
    and frequency to those of the output.

    A token that is listed twice is written twice, with the same value.
    """
    if sampling.repetition_penalty != 1.0:
        seen, penalty = _token_ids([*prompt, *output], row.device), sampling.repetition_penalty
        values = row[seen]
        row[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if output and (sampling.presence_penalty or sampling.frequency_penalty):
        ids = _token_ids(output, row.device)
        counts = torch.bincount(ids, minlength=row.numel())[ids]
        row[ids] -= sampling.presence_penalty + sampling.frequency_penalty * counts


def _token_ids(token_ids: "list[int] | array[int]", device: torch.device) -> torch.Tensor:
    """Make an int64 tensor, through numpy: a fifth of the time of torch.tensor."""
    return torch.from_numpy(np.array(token_ids, dtype=np.int64)).to(device)


# ==== the draw ====


def _draw(row: torch.Tensor, request: ScheduledRequest, best: int) -> int:
    """Draw a token; the likeliest if the temperature is so small that dividing by it overflows."""
    sampling = request.sampling
    row = row / sampling.temperature
    if not row[best].isfinite():
        return best
    _filter(row, sampling)
    return gumbel_argmax(row, sampling.seed + request.choice, request.end)


def _filter(row: torch.Tensor, sampling: SamplingParams) -> None:
    """Set to -inf what top-k, then top-p, then min-p exclude; ties with the last one stay."""
    if 0 < sampling.top_k < row.numel():
        row[row < row.topk(sampling.top_k).values[-1]] = -torch.inf
    if sampling.top_p < 1.0:
        row[row < _nucleus_floor(row, sampling.top_p)] = -torch.inf
    if sampling.min_p > 0.0:
        row[row < row.max() + torch.tensor(sampling.min_p).log().item()] = -torch.inf


def _nucleus_floor(row: torch.Tensor, top_p: float) -> torch.Tensor:
    """Return the least logit of the smallest set of likeliest tokens of probability >= top_p."""
    total = row.logsumexp(dim=-1)
    for count in (min(TOP_P_CANDIDATES, row.numel()), row.numel()):
        values = row.topk(count).values
        before = (values - total).exp().cumsum(-1) - (values - total).exp()
        inside = int((before < top_p).sum())
        if inside < count or count == row.numel():
            break
    return values[max(inside, 1) - 1]


def gumbel_argmax(row: torch.Tensor, seed: int, position: int) -> int:
    """Return argmax over row [V] + noise [V]. Hashes only tokens that can still win.

    A token can exceed the likeliest token's noisy value only if its own value is less than
    MAX_NOISE below it, so the rest need no random number: same result, fewer hashes.
    """
    best = row.argmax()
    bar = row[best] + gumbel_noise(best.view(1), seed, position)[0]
    candidates = (row >= bar - MAX_NOISE).nonzero().view(-1)
    noisy = row[candidates] + gumbel_noise(candidates, seed, position)
    return int(candidates[noisy.argmax()])


def gumbel_noise(token_ids: torch.Tensor, seed: int, position: int) -> torch.Tensor:
    """Compute standard Gumbel noise, float32, for each token id at this seed and position."""
    key = _mix64((seed & _MASK64) ^ _mix64(position + 1))
    words = token_ids.to(torch.int32) ^ _signed32(key)
    words = _mix32(words) + _signed32(key >> 32)
    bits = (_mix32(words) >> (32 - NOISE_BITS)) & (2**NOISE_BITS - 1)
    uniform = (bits.float() + 0.5) * 2.0**-NOISE_BITS
    return -torch.log(-torch.log(uniform))


_MASK64 = 2**64 - 1


def _mix64(x: int) -> int:
    """Apply SplitMix64's finalizer (Steele et al. 2014) to a Python integer."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def _mix32(x: torch.Tensor) -> torch.Tensor:
    """Apply MurmurHash3's 32-bit finalizer (Appleby) to int32 that wraps, with logical shifts."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * _signed32(0x85EBCA6B)
    x = (x ^ ((x >> 13) & 0x7FFFF)) * _signed32(0xC2B2AE35)
    return x ^ ((x >> 16) & 0xFFFF)


def _signed32(x: int) -> int:
    x &= 0xFFFFFFFF
    return x - 2**32 if x >= 2**31 else x
