"""Measures decode steps whose adapters are more than A and B against those of plain adapters."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from engine.backends.cuda.head import with_head_site
from engine.backends.cuda.places import places_of
from engine.lora.overlay import Overlay
from engine.lora.weights import LoraWeights, SiteWeights
from engine.model.decoder import Decoder
from tests.bench.gpu_report import Goal, Row, attempt
from tests.bench.gpu_runner import PLAIN, RANK, Bench, Lane, paces
from tests.bench.gpu_setting import Setting

DORA, NORMS, TOKENS, HEAD = "DoRA", "norms", "token rows", "lm_head LoRA"
AT_LEAST = {DORA: 1 / 1.05}  # of the speed of plain adapters of the same rank
NUM_TOKENS = 64  # ids with rows of their own


def kinds(setting: Setting) -> Iterator[Row]:
    bench = Bench(setting, "none", changed)
    rows = setting.pick(32, 8, 2)
    names = (PLAIN, DORA, NORMS, TOKENS, HEAD)
    lane = bench.lane(rows, max_slots=len(names) * rows)
    lane.load([RANK] * rows * len(names), [name for name in names for _ in range(rows)])
    for batch in (1, rows):
        if not setting.budget.is_spent:
            yield from attempt(f"kinds x{batch}", _rows(bench, lane, names, batch, rows))


def _rows(bench: Bench, lane: Lane, names: tuple[str, ...], batch: int, each: int) -> Iterator[Row]:
    """Give every request an adapter of its own, all of one kind."""
    slots = {name: list(range(1 + i * each, 1 + i * each + batch)) for i, name in enumerate(names)}
    cases = {name: (lane, of_kind) for name, of_kind in slots.items()} | {
        "base": (lane, [0] * batch)
    }
    made = paces(cases, bench.sizes.rounds)
    for name, pace in made.items():
        speed = made[PLAIN].step_s / pace.step_s
        goal = Goal(speed, "plain adapters' speed", at_least=AT_LEAST.get(name), target="2")
        note = f"launch {pace.host_s * 1e3:.2f} ms"
        yield Row(f"kinds: decode x{batch}, {name}", pace.step_s * 1e3, "ms", goal, note=note)


def changed(weights: LoraWeights, kind: str, decoder: Decoder) -> LoraWeights:
    """Add what this kind has to a plain adapter."""
    if kind == DORA:
        return replace(weights, sites={k: _scaled(site) for k, site in weights.sites.items()})
    matrix = decoder.embedding.weight
    vocab_size, width = decoder.embedding.shape
    if kind == NORMS:
        norms = places_of(decoder).norms.items()
        return replace(
            weights, norms={name: torch.ones(n, device=matrix.device) for name, n in norms}
        )
    if kind == TOKENS:
        ids = torch.arange(0, vocab_size, -(-vocab_size // NUM_TOKENS), device=matrix.device)
        rows = Overlay(ids, matrix[ids], None, vocab_size)
        return replace(weights, embedding=rows, head=rows)
    if kind == HEAD:
        none = torch.empty(0, dtype=torch.int64, device=matrix.device)
        factors = matrix.new_zeros(RANK, width), matrix.new_zeros(RANK, vocab_size)
        head = Overlay(none, matrix[:0], factors, vocab_size)
        return with_head_site(replace(weights, head=head), vocab_size)
    return weights


def _scaled(site: SiteWeights) -> SiteWeights:
    return replace(site, scale=torch.ones(_width(site), device=site.a.device))


def _width(site: SiteWeights) -> int:
    return max(out1 for _, _, _, out1, _ in site.expands)
