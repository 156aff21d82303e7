"""TokenRules: which tokens end a request, may not be sampled, or have a bias.

Made once per request and shared by its choices, so that a step's cost does not grow with the
lists: to look up an end token takes constant time, and samplers take the arrays as they are.
"""

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

INT32, FLOAT32 = "i", "f"  # typecodes
NO_TOKENS: "array[int]" = array(INT32)

Words = Sequence[Sequence[int]]


class TokenBiases(NamedTuple):
    """Values that are added to the logits of some tokens; each token is listed once."""

    token_ids: "array[int]"
    values: "array[float]"


@dataclass(frozen=True, slots=True)
class BadWords:
    """Token sequences that no output may contain: the last token of one is forbidden behind the
    others."""

    token_ids: frozenset[int] = frozenset()  # those that are a sequence by themselves
    by_token: Mapping[int, Words] = field(default_factory=dict[int, Words])  # before the last one

    def after(self, output: Sequence[int]) -> list[int]:
        """List the tokens that would complete a longer sequence behind this output."""
        words = self.by_token.get(output[-1], ()) if output else ()
        return [word[-1] for word in words if list(output[1 - len(word) :]) == list(word[:-1])]


class TokenRules(NamedTuple):
    end_token_ids: frozenset[int] = frozenset()  # end the request once it has `min_tokens`
    biases: TokenBiases | None = None
    allowed_token_ids: "array[int] | None" = None
    bad_words: BadWords | None = None
    # What may not be sampled: as long as the request may not end, and from then on
    early: "array[int]" = NO_TOKENS
    always: "array[int]" = NO_TOKENS

    def forbidden(self, may_end: bool, output: Sequence[int]) -> "array[int]":
        """List what may not be sampled behind this output, all of which must be known if there
        are bad words of several tokens."""
        token_ids = self.always if may_end else self.early
        if self.bad_words is None or not self.bad_words.by_token:
            return token_ids
        more = self.bad_words.after(output)
        return array(INT32, sorted({*token_ids, *more})) if more else token_ids

    @property
    def needs_output(self) -> bool:
        """Whether the last output token must be known before the next one is sampled."""
        return self.bad_words is not None and bool(self.bad_words.by_token)


NO_RULES = TokenRules()


def token_rules(
    end_token_ids: frozenset[int],
    logit_bias: Iterable[tuple[int, float]],
    bad_words: Words = (),
    allowed_token_ids: Iterable[int] | None = None,
) -> TokenRules:
    words = read_bad_words(bad_words)
    always = frozenset[int]() if words is None else words.token_ids
    return TokenRules(
        end_token_ids,
        token_biases(logit_bias),
        None if allowed_token_ids is None else array(INT32, sorted(set(allowed_token_ids))),
        words,
        array(INT32, sorted(end_token_ids | always)),
        array(INT32, sorted(always)) if always else NO_TOKENS,
    )


def read_bad_words(words: Words) -> BadWords | None:
    by_token: dict[int, list[Sequence[int]]] = {}
    for word in words:
        if len(word) > 1:
            by_token.setdefault(word[-2], []).append(word)
    token_ids = frozenset(word[0] for word in words if len(word) == 1)
    return BadWords(token_ids, by_token) if words else None


def token_biases(logit_bias: Iterable[tuple[int, float]]) -> TokenBiases | None:
    """Collect biases; the last one counts for a token that is listed twice."""
    biases = dict(logit_bias)
    if not biases:
        return None
    return TokenBiases(array(INT32, biases.keys()), array(FLOAT32, biases.values()))
