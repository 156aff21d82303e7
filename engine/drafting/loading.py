"""Loads a draft model beside its base, and divides the memory between them."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from engine.announcer import SILENT, Announcer
from engine.backends.load import load_model
from engine.backends.loaded import LoadedModel
from engine.backends.needs import arena_bytes
from engine.config import ConfigError, EngineConfig
from engine.drafting.draft_model import DraftModel
from engine.settle import Settled, settle

KEY = "speculation.model"


def settle_draft(config: EngineConfig, base: Settled) -> tuple[EngineConfig, Settled]:
    """Settle the draft model: it gets the part of memory in which its KV blocks hold as many tokens
    as the base's in the rest. Raises ConfigError or ModelError."""
    source = config.speculation.model
    assert source is not None
    if base.device.type != "cpu":
        raise config.speculation.impossible_on(base.device)
    wanted = EngineConfig(
        source=source,
        dtype=str(base.dtype).removeprefix("torch."),
        quantization="auto",
        device=base.device.type,
        kernels=config.kernels,
        max_num_seqs=config.max_num_seqs,
        block_size=config.block_size,
        memory_bytes=base.memory_bytes,
        adapter_memory_bytes=0,
        num_threads=config.num_threads,
    )
    try:
        block_bytes = settle(wanted, arena_bytes).block_bytes
        num_blocks = base.memory_bytes // (base.block_bytes + block_bytes)
        wanted = replace(wanted, memory_bytes=num_blocks * block_bytes)
        settled = settle(wanted, arena_bytes)
    except ConfigError as error:
        raise ConfigError(f"{KEY}={source!r}: {error}") from error
    _check_vocabularies(Path(config.source), Path(source))
    return wanted, settled


class LoadedDraft(NamedTuple):
    drafter: DraftModel
    weight_bytes: int


def load_draft(
    config: EngineConfig,
    settled: Settled,
    base: Settled,
    beside: LoadedModel,
    *,
    clock: Callable[[], float] = time.monotonic,
    announcer: Announcer = SILENT,
) -> LoadedDraft:
    """Read the weights; `beside` is the base. Raises ModelError or ConfigError."""
    model = load_model(config, settled, announcer=announcer, beside=beside)
    drafter = DraftModel(
        model.make_runner(_no_adapter),
        num_blocks=settled.num_blocks,
        block_size=config.block_size,
        max_batched_tokens=settled.max_num_batched_tokens,
        max_model_len=settled.max_model_len,
        vocab_size=min(settled.spec.vocab_size, base.spec.vocab_size),
        clock=clock,
    )
    return LoadedDraft(drafter, model.weight_bytes)


def _no_adapter(digest: str) -> Any:
    raise AssertionError(f"a draft model was asked for adapter {digest}")


def _check_vocabularies(base: Path, draft: Path) -> None:
    """Check that both have the same token ids, but for padding behind them."""
    ours, others = _token_ids(base), _token_ids(draft)
    for token in ours.keys() | others.keys():
        if ours.get(token) != others.get(token):
            raise ConfigError(
                f"{KEY}={str(draft)!r}: the vocabularies differ: token {token!r} is "
                f"{ours.get(token)} in the base's, and {others.get(token)} in the draft model's; "
                f"it must be a smaller model with the same tokenizer"
            )


def _token_ids(folder: Path) -> dict[str, int]:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(
            f"{KEY}: {str(path)!r} is not there; the vocabularies of the base and the draft model "
            f"are compared by their tokenizer.json"
        )
    document = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = document["model"]["vocab"]
    if isinstance(vocabulary, list):  # of a unigram model: tokens with their scores
        vocabulary = {token: at for at, (token, _) in enumerate(vocabulary)}
    return vocabulary | {each["content"]: each["id"] for each in document["added_tokens"]}
