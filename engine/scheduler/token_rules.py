"""TokenRules: which tokens end a request, may not be sampled yet, or have a bias.

Made once per request and shared by its choices, so that a step's cost does not grow with the
lists: to look up an end token takes constant time, and samplers take the arrays as they are.
"""

from array import array
from collections.abc import Iterable
from typing import NamedTuple

INT32, FLOAT32 = "i", "f"  # typecodes
NO_TOKENS: "array[int]" = array(INT32)


class TokenBiases(NamedTuple):
    """Values that are added to the logits of some tokens; each token is listed once."""

    token_ids: "array[int]"
    values: "array[float]"


class TokenRules(NamedTuple):
    end_token_ids: frozenset[int] = frozenset()  # end the request once it has `min_tokens`
    sorted_end_token_ids: "array[int]" = NO_TOKENS
    biases: TokenBiases | None = None


NO_RULES = TokenRules()


def token_rules(
    end_token_ids: frozenset[int], logit_bias: Iterable[tuple[int, float]]
) -> TokenRules:
    return TokenRules(end_token_ids, array(INT32, sorted(end_token_ids)), token_biases(logit_bias))


def token_biases(logit_bias: Iterable[tuple[int, float]]) -> TokenBiases | None:
    """Collect biases; the last one counts for a token that is listed twice."""
    biases = dict(logit_bias)
    if not biases:
        return None
    return TokenBiases(array(INT32, biases.keys()), array(FLOAT32, biases.values()))
