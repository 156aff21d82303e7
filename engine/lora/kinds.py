"""Names what an adapter changes beside factors of linear layers, and refuses what is not served.

A backend lists the kinds that it computes in its LoadedModel. An adapter of another kind is an
error when it is loaded: it must never be served as if the rest of it were all.
"""

from collections.abc import Collection
from enum import StrEnum

from engine.lora.weights import AdapterLoadError, LoraWeights


class Kind(StrEnum):
    """A change that needs code of its own in a backend; the value is how messages call it."""

    AFFINE = "scaled or shifted outputs of linear layers (DoRA, biases)"
    NORMS = "replaced norms"
    EMBEDDING = "changed token embeddings"
    HEAD = "a changed output layer"
    VOCABULARY = "more token ids than the base has"


ALL_KINDS = frozenset(Kind)


def kinds_of(weights: LoraWeights, vocab_size: int) -> frozenset[Kind]:
    """List the kinds of an adapter; `vocab_size` is the base's."""
    found: set[Kind] = set()
    if any(s.scale is not None or s.shift is not None for s in weights.sites.values()):
        found.add(Kind.AFFINE)
    if weights.norms:
        found.add(Kind.NORMS)
    if weights.embedding is not None:
        found.add(Kind.EMBEDDING)
    if weights.head is not None:
        found.add(Kind.HEAD)
    if weights.vocab_size > vocab_size:
        found.add(Kind.VOCABULARY)
    return frozenset(found)


def check_kinds(
    weights: LoraWeights, vocab_size: int, served: Collection[Kind], kernels: str
) -> None:
    """Raise AdapterLoadError for a kind that these kernels do not compute."""
    missing = sorted(kinds_of(weights, vocab_size) - set(served))
    if missing:
        raise AdapterLoadError(
            f"adapter {weights.digest} has {missing[0]}, which the {kernels} kernels do not "
            "compute; kernels='torch' does"
        )
