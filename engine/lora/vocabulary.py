"""Loads what an adapter changes of the embedding and of the output layer, as Overlays.

PEFT writes both into the file wherever both were trained, also if the base ties them. Two changes
reach the output layer of a tied base without being written twice: trained rows of tokens, and a
matrix that PEFT loads into the base's own parameter.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapter_store.layout import MAX_NEW_ROWS, LoraModule, SavedTensor, TokenRows, vocab_rows
from engine.lora.overlay import Overlay
from engine.lora.overlay_factors import check_finite, with_factors
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
    spec = source.base.spec
    if spec.tied_embeddings:
        head = _tied_head(embedding, head)
    vocab_size = _vocab_size((embedding, head), spec.vocab_size, spec.tied_embeddings)
    return _load(embedding, vocab_size, source), _load(head, vocab_size, source)


def _vocab_size(changes: Sequence[_Change], base: int, is_tied: bool) -> int:
    """Return the number of token ids with the adapter, of which the base has `base`.

    What the file has of a matrix tells its rows. Fewer than the base's are the first ones of it, as
    where the base was made smaller before training; both matrices must tell, unless they are tied.
    More need all rows of both.
    """
    vocab_size = max((rows for change in changes for rows in change.num_rows), default=base)
    if vocab_size > base + MAX_NEW_ROWS:
        raise AdapterLoadError(
            f"the adapter has {vocab_size} token ids, the base {base}; at most {MAX_NEW_ROWS} more "
            "are served"
        )
    for change in changes:
        _check_rows(change, vocab_size, base, is_tied)
    return vocab_size


def _check_rows(change: _Change, vocab_size: int, base: int, is_tied: bool) -> None:
    module, some = change.module, change.some
    is_told = is_tied or bool(change.num_rows)
    if vocab_size > base:
        is_told = change.whole is not None
    for rows in change.num_rows if is_told else [base]:
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
    module, base = change.module, source.base
    ids, rows = _changed_rows(module, change, source)
    is_smaller_head = module == HEAD and vocab_size < base.spec.vocab_size
    if not len(ids) and change.factors is None and not is_smaller_head:
        return None
    overlay = Overlay(ids, rows, None, vocab_size)
    if change.factors is None:
        return overlay
    if change.factors.magnitude is not None and change.some is not None:
        raise AdapterLoadError(
            f"{module} has DoRA and trained rows of tokens ({change.some.tensor}), which PEFT does "
            "not run either"
        )
    of_embedding = module == EMBEDDING
    return with_factors(
        overlay, change.factors, module, of_embedding, _matrix(change, source), source
    )


def _matrix(change: _Change, source: Source) -> Iterator[Tensor]:
    """Yield all rows of the matrix in float32 [n, E], as the model has them with this adapter."""
    base, whole = source.base, change.whole
    if whole is None:
        matrix = base.vocabulary(_key(change.module, source))
    else:
        shape = whole.shape[0], base.spec.hidden_size
        matrix = source.tensor(whole.tensor, shape, change.module)
    for start in range(0, len(matrix), BLOCK_ROWS):
        yield matrix[start : start + BLOCK_ROWS].to(source.dtype).float()


def _key(module: str, source: Source) -> str:
    return f"{EMBEDDING if source.base.spec.tied_embeddings else module}.weight"


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
    check_finite(module, rows)
    return ids, rows


def _differing(module: str, whole: SavedTensor, source: Source) -> tuple[Tensor, Tensor]:
    base = source.base
    num_rows, shape = whole.shape[0], (whole.shape[0], base.spec.hidden_size)
    own = source.tensor(whole.tensor, shape, module)
    theirs = base.vocabulary(_key(module, source))
    ids: list[Tensor] = []
    shared = min(num_rows, len(theirs))
    for start in range(0, shared, BLOCK_ROWS):
        block = slice(start, min(start + BLOCK_ROWS, shared))
        differs = own[block].to(source.dtype) != theirs[block].to(source.dtype)
        ids.append(differs.any(1).nonzero().flatten() + start)
    found = torch.cat([*ids, torch.arange(shared, num_rows)])
    return found, own[found].to(source.dtype)
