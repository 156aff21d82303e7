"""Sampler: logits to token ids, each row by its own SamplingParams.

Random numbers are a function of (seed + choice index, position, token id) and of nothing else:
a token is the argmax of log-probability plus Gumbel noise from a counter-based hash (the Gumbel-max
trick; Yellott 1977), so the same request draws the same tokens in any batch, on any replica and
after a resumption in its middle.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from engine.scheduler.batch import ScheduledRequest
from engine.scheduler.request import SamplingParams

NOISE_BITS = 23  # (n + 0.5) / 2**23 is exact in float32 and never 0 or 1
MAX_NOISE = 16.7  # above -log(-log(1 - 2**-24)), the largest value that can be drawn
TOP_P_CANDIDATES = 1024  # nucleus looked for among these before sorting the vocabulary


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A chosen token; `logprob` and `top` are None unless the request asked for them."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def best_tokens(logits: torch.Tensor) -> tuple[list[int], list[float]]:
    """Of each row [V]: the largest logit's token and that logit, NaN if any of them is NaN."""
    highest, token_ids = logits.max(dim=-1)
    return token_ids.tolist(), highest.tolist()


class NotFinite:
    """In place of a token: the row's logits are NaN or infinite. Only its own request ends."""


def sample(
    requests: list[ScheduledRequest],
    logits: torch.Tensor,
    find_best: Callable[[torch.Tensor], tuple[list[int], list[float]]] = best_tokens,
) -> list[SampledToken | NotFinite]:
    """One token per row of logits [B, V] float32, which is modified in place.

    `find_best` does what `best_tokens` does.
    """
    wanted = [(i, r.sampling.logprobs) for i, r in enumerate(requests)]
    logprobs = {i: (logits[i].clone(), k) for i, k in wanted if k is not None}
    for i, request in enumerate(requests):
        _adjust(logits[i], request)
    token_ids, highest = find_best(logits)
    sampled: list[SampledToken | NotFinite] = []
    for i, request in enumerate(requests):
        if not math.isfinite(highest[i]):
            sampled.append(NotFinite())
            continue
        greedy = request.sampling.temperature == 0
        token_id = token_ids[i] if greedy else _draw(logits[i], request)
        has_logprobs = i in logprobs
        sampled.append(
            _with_logprobs(token_id, *logprobs[i]) if has_logprobs else SampledToken(token_id)
        )
    return sampled


def target_logprobs(
    logits: torch.Tensor, targets: list[int], num_top: int
) -> list[tuple[float, tuple[tuple[int, float], ...]]]:
    """For each row of logits [M, V]: the target's logprob and the `num_top` most likely."""
    rows = torch.log_softmax(logits.float(), dim=-1)
    return [_pick(row, target, num_top) for row, target in zip(rows, targets, strict=True)]


def _with_logprobs(token_id: int, logits: torch.Tensor, num_top: int) -> SampledToken:
    logprob, top = _pick(torch.log_softmax(logits, dim=-1), token_id, num_top)
    return SampledToken(token_id, logprob, top)


def _pick(
    logprobs: torch.Tensor, token_id: int, num_top: int
) -> tuple[float, tuple[tuple[int, float], ...]]:
    values, ids = logprobs.topk(min(num_top, logprobs.numel()))
    return float(logprobs[token_id]), tuple(zip(ids.tolist(), values.tolist(), strict=True))


# ==== what changes the logits ====


def _adjust(row: torch.Tensor, request: ScheduledRequest) -> None:
    sampling = request.sampling
    if sampling.logit_bias:
        ids, biases = zip(*sampling.logit_bias, strict=True)
        row[list(ids)] += torch.tensor(biases, device=row.device)
    if request.history is not None:
        _penalize(row, *request.history, sampling)
    if request.forbidden_token_ids:
        row[list(request.forbidden_token_ids)] = -torch.inf


def _penalize(
    row: torch.Tensor, prompt: list[int], output: list[int], sampling: SamplingParams
) -> None:
    """Repetition (Keskar et al. 2019) counts prompt and output; presence and frequency, output."""
    if sampling.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*prompt, *output}), device=row.device)
        values, penalty = row[seen], sampling.repetition_penalty
        row[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if output and (sampling.presence_penalty or sampling.frequency_penalty):
        ids, counts = torch.tensor(output, device=row.device).unique(return_counts=True)
        row[ids] -= sampling.presence_penalty + sampling.frequency_penalty * counts


# ==== the draw ====


def _draw(row: torch.Tensor, request: ScheduledRequest) -> int:
    sampling = request.sampling
    row = row / sampling.temperature
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
    """The smallest logit of the smallest set of likeliest tokens whose probability is >= top_p."""
    total = row.logsumexp(dim=-1)
    for count in (min(TOP_P_CANDIDATES, row.numel()), row.numel()):
        values = row.topk(count).values
        before = (values - total).exp().cumsum(-1) - (values - total).exp()
        inside = int((before < top_p).sum())
        if inside < count or count == row.numel():
            break
    return values[max(inside, 1) - 1]


def gumbel_argmax(row: torch.Tensor, seed: int, position: int) -> int:
    """argmax over row [V] + noise [V]. Hashes only tokens that can still win.

    The likeliest token's noisy value is a bar that others clear only if their own value is less
    than MAX_NOISE below it, so the rest need no random number: same result, fewer hashes.
    """
    best = row.argmax()
    bar = row[best] + gumbel_noise(best.view(1), seed, position)[0]
    candidates = (row >= bar - MAX_NOISE).nonzero().view(-1)
    noisy = row[candidates] + gumbel_noise(candidates, seed, position)
    return int(candidates[noisy.argmax()])


def gumbel_noise(token_ids: torch.Tensor, seed: int, position: int) -> torch.Tensor:
    """Standard Gumbel noise, float32, for each token id at this seed and position."""
    key = _mix64((seed & _MASK64) ^ _mix64(position + 1))
    words = token_ids.to(torch.int32) ^ _signed32(key)
    words = _mix32(words) + _signed32(key >> 32)
    bits = (_mix32(words) >> (32 - NOISE_BITS)) & (2**NOISE_BITS - 1)
    uniform = (bits.float() + 0.5) * 2.0**-NOISE_BITS
    return -torch.log(-torch.log(uniform))


_MASK64 = 2**64 - 1


def _mix64(x: int) -> int:
    """SplitMix64's finalizer (Steele et al. 2014), on Python integers."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def _mix32(x: torch.Tensor) -> torch.Tensor:
    """MurmurHash3's 32-bit finalizer (Appleby), on int32 that wraps; shifts are made logical."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * _signed32(0x85EBCA6B)
    x = (x ^ ((x >> 13) & 0x7FFFF)) * _signed32(0xC2B2AE35)
    return x ^ ((x >> 16) & 0xFFFF)


def _signed32(x: int) -> int:
    x &= 0xFFFFFFFF
    return x - 2**32 if x >= 2**31 else x
