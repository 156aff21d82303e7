"""Loads what an adapter changes of the embedding and of the output layer, as Overlays.

PEFT writes both into the file wherever both were trained, also if the base ties them. Two changes
reach the output layer of a tied base without being written twice: trained rows of tokens, and a
matrix that PEFT loads into the base's own parameter.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapter_store.layout import MAX_NEW_ROWS, LoraModule, SavedTensor, TokenRows, vocab_rows
from engine.lora.overlay import Overlay
from engine.lora.source import Source
from engine.lora.weights import AdapterLoadError

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
BLOCK_ROWS = 4096  # that are compared with the base's at a time


@dataclass(frozen=True, slots=True)
class _Change:
    """What becomes of one of the two matrices; None: nothing."""

    module: str
    factors: LoraModule | None
    whole: SavedTensor | None
    some: TokenRows | None

    @property
    def is_empty(self) -> bool:
        return self.factors is None and self.whole is None and self.some is None

    @property
    def num_rows(self) -> list[int]:
        """The matrix's rows, as each tensor has them that tells."""
        factors = {} if self.factors is None else {self.module: self.factors}
        replaced = {} if self.whole is None else {f"{self.module}.weight": self.whole}
        return list(vocab_rows(factors, replaced).values())


def load_vocabulary(
    modules: Mapping[str, LoraModule],
    replaced: Mapping[str, SavedTensor],
    token_rows: Mapping[str, TokenRows],
    source: Source,
) -> tuple[Overlay | None, Overlay | None]:
    """Load the overlays of the embedding and of the output layer. Raises AdapterLoadError.

    The mappings have the decoder's names, and may hold other modules too.
    """

    def change_of(module: str) -> _Change:
        whole = replaced.get(f"{module}.weight")
        return _Change(module, modules.get(module), whole, token_rows.get(module))

    embedding, head = change_of(EMBEDDING), change_of(HEAD)
    if embedding.is_empty and head.is_empty:
        return None, None
    if source.base.spec.tied_embeddings:
        head = _tied_head(embedding, head)
    vocab_size = _vocab_size((embedding, head), source.base.spec.vocab_size)
    return _load(embedding, vocab_size, source), _load(head, vocab_size, source)


def _vocab_size(changes: Sequence[_Change], base: int) -> int:
    """Return the number of token ids with the adapter, of which the base has `base`.

    What the file has of a matrix tells its rows. Fewer than the base's are the first ones of it, as
    where the base was made smaller before training. More need all rows of both matrices.
    """
    vocab_size = max((rows for change in changes for rows in change.num_rows), default=base)
    if vocab_size > base + MAX_NEW_ROWS:
        raise AdapterLoadError(
            f"the adapter has {vocab_size} token ids, the base {base}; at most {MAX_NEW_ROWS} more "
            "are served"
        )
    for change in changes:
        _check_rows(change, vocab_size, base)
    return vocab_size


def _check_rows(change: _Change, vocab_size: int, base: int) -> None:
    module, some = change.module, change.some
    lacks_new_rows = vocab_size > base and change.whole is None
    for rows in [base] if lacks_new_rows else change.num_rows:
        if rows != vocab_size:
            raise AdapterLoadError(
                f"with the adapter, {module} has {rows} rows, and there are {vocab_size} token "
                f"ids; each needs a row in both {EMBEDDING} and {HEAD}"
            )
    if some is not None and max(some.token_ids) >= vocab_size:
        raise AdapterLoadError(
            f"{some.tensor} has a row of token id {max(some.token_ids)}, and {module} has "
            f"{vocab_size} rows"
        )


def _tied_head(embedding: _Change, head: _Change) -> _Change:
    whole, some = head.whole, head.some
    if whole is None and embedding.whole is not None and embedding.whole.is_base:
        whole = embedding.whole
    if some is None and embedding.some is not None:
        if head.factors is not None or head.whole is not None:
            raise AdapterLoadError(
                f"{embedding.some.tensor} are rows of an embedding that is tied to the output "
                "layer, and the output layer has changes of its own; PEFT does not run that either"
            )
        some = embedding.some
    return _Change(HEAD, head.factors, whole, some)


def _load(change: _Change, vocab_size: int, source: Source) -> Overlay | None:
    ids, rows = _changed_rows(change.module, change, source)
    factors = _load_factors(change.module, change.factors, vocab_size, source)
    is_smaller_head = change.module == HEAD and vocab_size < source.base.spec.vocab_size
    if not len(ids) and factors is None and not is_smaller_head:
        return None
    return Overlay(ids, rows, factors, vocab_size)


def _changed_rows(module: str, change: _Change, source: Source) -> tuple[Tensor, Tensor]:
    """Return ids [K], ascending, and rows [K, E] of what differs from the base's own."""
    width = source.base.spec.hidden_size
    ids = torch.empty(0, dtype=torch.long)
    rows = torch.empty(0, width, dtype=source.dtype)
    if change.whole is not None:
        ids, rows = _differing(module, change.whole, source)
    if change.some is not None:
        wanted = torch.tensor(change.some.token_ids, dtype=torch.long)
        shape = len(wanted), width
        own = source.tensor(change.some.tensor, shape, module).to(source.dtype)
        kept = ~torch.isin(ids, wanted)
        ids, rows = torch.cat([ids[kept], wanted]), torch.cat([rows[kept], own])
        ids, order = ids.sort()
        rows = rows[order]
    _check_finite(module, rows)
    return ids, rows


def _differing(module: str, whole: SavedTensor, source: Source) -> tuple[Tensor, Tensor]:
    base = source.base
    num_rows, shape = whole.shape[0], (whole.shape[0], base.spec.hidden_size)
    own = source.tensor(whole.tensor, shape, module)
    theirs = base.vocabulary(f"{EMBEDDING if base.spec.tied_embeddings else module}.weight")
    ids: list[Tensor] = []
    shared = min(num_rows, len(theirs))
    for start in range(0, shared, BLOCK_ROWS):
        block = slice(start, min(start + BLOCK_ROWS, shared))
        differs = own[block].to(source.dtype) != theirs[block].to(source.dtype)
        ids.append(differs.any(1).nonzero().flatten() + start)
    found = torch.cat([*ids, torch.arange(shared, num_rows)])
    return found, own[found].to(source.dtype)


def _load_factors(
    module: str, factors: LoraModule | None, vocab_size: int, source: Source
) -> tuple[Tensor, Tensor] | None:
    """Read A [V', r], B [r, E] of the embedding, or A [r, E], B [r, V'] of the output layer."""
    if factors is None:
        return None
    rank, width = factors.lora_rank, source.base.spec.hidden_size
    inner, outer = (vocab_size, width) if module == EMBEDDING else (width, vocab_size)
    a = source.tensor(factors.lora_a, (rank, inner), module).to(source.dtype)
    b = source.tensor(factors.lora_b, (outer, rank), module).float() * factors.scaling
    b = b.to(source.dtype).T.contiguous()
    _check_finite(module, b)
    return (a.T.contiguous() if module == EMBEDDING else a), b


def _check_finite(module: str, values: Tensor) -> None:
    if values.numel() and not values.abs().max().isfinite():
        raise AdapterLoadError(f"{module}: the adapter's values are not finite in {values.dtype}")
