"""Tests adapters that replace norms, embeddings and the output layer, against merged checkpoints.

What replaces rows or whole weights gives the very bits of the checkpoint that has them; factors are
compared with their product in float32.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine import adapter_loader
from engine.backends.native import load
from engine.backends.native.library import Context
from engine.engine import Engine
from engine.lora.overlay import Overlay
from engine.lora.weights import LoraWeights
from engine.messages import AdapterFolder, GenerateRequest
from tests.engine.support.driver import Result, greedy, make_engine, prompt_of, run, write_adapter
from tests.engine.support.tiny import VOCAB_SIZE, Tiny

BF16 = torch.bfloat16
EXTRA = 3  # token ids that only the adapter has
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(autouse=True)
def only_this_isa(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "Context", partial(Context, isa))


def native_engine(folder: Path, **changes: Any) -> Engine:
    defaults = {"dtype": "bfloat16", "block_size": 16, "num_threads": 2, "adapter_proof": "off"}
    engine = make_engine(folder, **{**defaults, **changes})
    assert engine.info.kernels.startswith("native-")
    return engine


@dataclass(frozen=True, slots=True)
class Case:
    """A base in bfloat16, a plain adapter, and what to change of the base."""

    base: Path
    plain: AdapterFolder
    tensors: dict[str, Tensor]

    def merged(self, changed: dict[str, Tensor]) -> Path:
        """Write the base with these tensors in place of its own."""
        folder = self.base.parent / f"merged-{len(list(self.base.parent.iterdir()))}"
        shutil.copytree(self.base, folder)
        save_file({**self.tensors, **changed}, folder / "model.safetensors", {"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        rows = len(changed.get(EMBEDDING, self.tensors[EMBEDDING]))
        (folder / "config.json").write_text(json.dumps({**config, "vocab_size": rows}))
        return folder

    def adapter(self, monkeypatch: pytest.MonkeyPatch, weights: LoraWeights) -> AdapterFolder:
        """Make an adapter that loads as these weights; the plain one loads as before."""
        read = adapter_loader.load_lora

        def loaded(folder: AdapterFolder, *rest: Any, **named: Any) -> LoraWeights:
            return weights if folder.digest == weights.digest else read(folder, *rest, **named)

        monkeypatch.setattr(adapter_loader, "load_lora", loaded)
        return AdapterFolder(weights.digest, self.plain.path)


@pytest.fixture(scope="module", params=["qwen3", "gemma2"])
def case(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Callable[..., Tiny],
) -> Case:
    base = tiny_model(request.param, dtype=BF16).folder
    folder = tmp_path_factory.mktemp(request.param)
    copied = folder / "base"
    shutil.copytree(base, copied)
    plain = write_adapter(copied, folder / "plain", r=4)
    return Case(copied, plain, load_file(copied / "model.safetensors"))


def noise(like: Tensor, spread: float = 0.5, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return like + (torch.randn(like.shape, generator=generator) * spread).to(like.dtype)


def requests(*adapters: AdapterFolder | None, max_tokens: int = 12) -> list[GenerateRequest]:
    """Make requests of several lengths, which each adapter answers, and the base."""
    sampling = greedy(max_tokens, logprobs=2, prompt_logprobs=1)
    return [
        GenerateRequest(f"{i}-{length}", prompt_of(length, seed=length), sampling, adapter_folder=a)
        for i, a in enumerate(adapters)
        for length in (1, 9, 40)
    ]


def answers(results: dict[tuple[str, int], Result], index: int) -> dict[str, object]:
    """Return the answers of the requests of one adapter, by length."""
    found: dict[str, object] = {}
    for (name, _), result in results.items():
        number, _, length = name.partition("-")
        if int(number) == index:
            assert result.first is not None and result.first.error is None, result.first
            found[length] = result.token_ids, result.logprobs, result.first.prompt_logprobs
    return found


def assert_same_bits(case: Case, adapter: AdapterFolder, merged: Path) -> None:
    """Compare a mixed batch, in two sizes of step, with each request's own model alone."""
    alone = run(native_engine(merged), requests(None))
    base = run(native_engine(case.base), requests(None, case.plain))
    assert answers(alone, 0) != answers(base, 0), "the adapter changes nothing"
    for rows in (64, 16):
        engine = native_engine(case.base, max_num_batched_tokens=rows)
        mixed = run(engine, requests(adapter, None, case.plain))
        assert answers(mixed, 0) == answers(alone, 0)
        assert [answers(mixed, i) for i in (1, 2)] == [answers(base, i) for i in (0, 1)]


def test_replaced_norms_give_the_bits_of_a_checkpoint_that_has_them(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [name for name in case.tensors if "norm" in name and "layers.1." not in name]
    changed = {name: noise(case.tensors[name], seed=i) for i, name in enumerate(names)}
    offset = float("gemma" in case.base.parent.name)
    form = torch.float32 if offset else BF16
    norms = {
        name.removesuffix(".weight"): (value.float() + offset).to(form)
        for name, value in changed.items()
    }
    adapter = case.adapter(monkeypatch, LoraWeights("norms", {}, 0, norms=norms))
    assert_same_bits(case, adapter, case.merged(changed))


def rows_of(matrix: Tensor, ids: Tensor, seed: int) -> tuple[Overlay, Tensor]:
    """Change these rows; ids from the matrix's end on are added to it."""
    wide = torch.cat([matrix, matrix[: max(0, int(ids[-1]) + 1 - len(matrix))]])
    wide[ids] = noise(wide[ids], 1.0, seed)
    return Overlay(ids, wide[ids].clone(), None, len(wide)), wide


@pytest.mark.parametrize("extra", [0, EXTRA], ids="{} new ids".format)
def test_replaced_rows_give_the_bits_of_a_checkpoint_that_has_them(
    case: Case, extra: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.tensor([0, *range(50, 90), *range(200, VOCAB_SIZE + extra)])
    embedding, wide_embedding = rows_of(case.tensors[EMBEDDING], ids, 1)
    head, wide_head = rows_of(case.tensors[HEAD], ids, 2)
    weights = LoraWeights("rows", {}, 0, embedding=embedding, head=head)
    merged = case.merged({EMBEDDING: wide_embedding, HEAD: wide_head})
    adapter = case.adapter(monkeypatch, weights)
    assert_same_bits(case, adapter, merged)
    if extra:
        engine = native_engine(case.base)
        found = run(engine, requests(adapter, max_tokens=60)).values()
        assert any(t >= VOCAB_SIZE for result in found for t in result.token_ids)


def test_factors_of_embedding_and_head_give_the_logits_of_their_product(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedding, head = case.tensors[EMBEDDING], case.tensors[HEAD]
    vocab, width = embedding.shape
    factors = [
        noise(torch.zeros(shape), 0.3, i)
        for i, shape in enumerate([(vocab, 5), (5, width), (5, width), (5, vocab)])
    ]
    a, b, head_a, head_b = (factor.to(BF16) for factor in factors)
    none = torch.zeros(0, dtype=torch.int64)
    weights = LoraWeights(
        "factors",
        {},
        0,
        embedding=Overlay(none, embedding[none], (a, b), vocab),
        head=Overlay(none, head[none], (head_a, head_b), vocab),
    )
    product = {
        EMBEDDING: embedding.float() + a.float() @ b.float(),
        HEAD: head.float() + (head_a.float().T @ head_b.float()).T,
    }
    merged = case.merged(product)
    adapter = case.adapter(monkeypatch, weights)

    def logprobs(engine: Engine, adapter: AdapterFolder | None) -> Tensor:
        prompt = GenerateRequest(
            "r", prompt_of(60), greedy(1, prompt_logprobs=0), adapter_folder=adapter
        )
        last = run(engine, [prompt])["r", 0].last
        assert last is not None and last.prompt_logprobs is not None, last
        return torch.tensor([entry.logprob for entry in last.prompt_logprobs[1:] if entry])

    exact = logprobs(make_engine(merged, dtype="float32"), None)
    rounded = logprobs(make_engine(merged, dtype="bfloat16", kernels="torch"), None)
    native = logprobs(native_engine(case.base), adapter)
    worst = (native - exact).square().mean().sqrt()
    assert worst < 1.25 * (rounded - exact).square().mean().sqrt() + 1e-3
    alone = [run(native_engine(case.base), [r]) for r in requests(adapter)]
    together = run(native_engine(case.base), requests(adapter, None, case.plain, adapter))
    for results in alone:
        for (name, _), result in results.items():
            assert together[name, 0].token_ids == result.token_ids
            assert together[name, 0].logprobs == result.logprobs
