"""Find what a whole model has changed of its embedding and of its output layer, exactly."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from adapter_store.conversion.change import Saved
from adapter_store.conversion.model_weights import ModelWeights
from adapter_store.conversion.tensor_file import Matrix, in_float32
from adapter_store.errors import AdapterInvalid

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
MAX_ROWS = 8192  # that are named one by one in a config; more are a whole matrix
_BLOCK = 4096  # rows that are in memory at a time


@dataclass(frozen=True, slots=True)
class _Rows:
    """One matrix of a model."""

    model: ModelWeights
    name: str  # in its file

    @property
    def shape(self) -> tuple[int, ...]:
        return self.model.file.entries[self.name][1].shape

    def read(self, rows: slice) -> Matrix:
        return in_float32(*self.model.file.raw(self.name, rows))


def vocabulary_changes(tuned: ModelWeights, base: ModelWeights) -> Iterator[Saved]:
    """Yield what differs of both matrices. Raises AdapterInvalid.

    Where base and model tie them it is one change, which reaches both.
    """
    if EMBEDDING not in base.others:
        return
    ties, tied = is_tied(tuned), is_tied(base)
    whole = tied and not ties  # by rows, one of them would reach the other
    own, others = _Rows(tuned, tuned.others[EMBEDDING]), _Rows(base, base.others[EMBEDDING])
    yield from _change(EMBEDDING, own, others, whole, is_shared=ties and tied)
    if ties and tied:
        return
    own = own if ties else _Rows(tuned, tuned.others[HEAD])
    others = others if tied else _Rows(base, base.others[HEAD])
    yield from _change(HEAD, own, others, whole, is_shared=False)


def trained_rows(tuned: ModelWeights, base: ModelWeights) -> Iterator[Saved]:
    """Yield what differs of those of both matrices that a part of a model has."""
    was_tied = is_tied(base)
    if HEAD in tuned.others and was_tied:
        raise AdapterInvalid(f"{HEAD} was trained, and the base uses its embeddings in its place")
    for name in sorted({EMBEDDING, HEAD} & tuned.others.keys()):
        own, others = (_Rows(model, model.others[name]) for model in (tuned, base))
        yield from _change(name, own, others, False, is_shared=was_tied)


def is_tied(model: ModelWeights) -> bool:
    """Check whether the embeddings are the output layer.

    A file may hold both although the config ties them; then they must be equal.
    """
    if HEAD not in model.others:
        return True
    if model.config.get("tie_word_embeddings") is not True:
        return False
    head, embedding = (_Rows(model, model.others[name]) for name in (HEAD, EMBEDDING))
    if head.shape != embedding.shape or _differing(head, embedding):
        raise AdapterInvalid(
            f"{HEAD} differs from {EMBEDDING}, but config.json says tie_word_embeddings=true: "
            "remove it from the file, or set that key to false"
        )
    return True


def _change(
    name: str, tuned: _Rows, base: _Rows, is_whole: bool, is_shared: bool
) -> Iterator[Saved]:
    dtype, num_rows = tuned.model.file.entries[tuned.name][1].dtype, tuned.shape[0]
    if tuned.shape == base.shape:
        ids = _differing(tuned, base)
        if not ids:
            return
        if not is_whole and len(ids) <= min(MAX_ROWS, num_rows // 2):
            rows = (tuned.model.file.raw(tuned.name, slice(i, i + 1))[1] for i in ids)
            yield Saved(name, dtype, (len(ids), tuned.shape[1]), rows, tuple(ids))
            return
    blocks = (tuned.model.file.raw(tuned.name, rows)[1] for rows in _blocks(num_rows))
    yield Saved(name, dtype, tuned.shape, blocks, is_shared=is_shared)


def _differing(tuned: _Rows, base: _Rows) -> list[int]:
    found: list[int] = []
    for rows in _blocks(tuned.shape[0]):
        differs = (tuned.read(rows) != base.read(rows)).any(axis=1)
        found += (np.flatnonzero(differs) + rows.start).tolist()
    return found


def _blocks(num_rows: int) -> Iterator[slice]:
    for start in range(0, num_rows, _BLOCK):
        yield slice(start, min(start + _BLOCK, num_rows))
