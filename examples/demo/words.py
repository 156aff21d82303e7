"""Draws the demo's words, separately for each split.

Names, cities, numbers, colour-noun pairs and adverb-adjective pairs are assigned to three splits
by hashing, so values used for measuring are never used in training, with any seed. Single nouns,
colours and adjectives are a lexicon that all splits share: the values and combinations of a
held-out sentence are new. Independent of sentences and models.
"""

import hashlib
import random
from collections.abc import Callable, Sequence
from enum import Enum
from typing import TypeVar

T = TypeVar("T")


class Split(Enum):
    TRAIN = "train"  # three fifths: the only data that the base and the adapters learn from
    TUNE = "tune"  # one fifth: decides when training stops
    HELD_OUT = "held out"  # one fifth: measured once, at the end


BUCKETS = (Split.TRAIN, Split.TRAIN, Split.TRAIN, Split.TUNE, Split.HELD_OUT)

# English plural -> Esperanto plural, accusative ("[she bought] lamps").
NOUNS = {
    "lamps": "lampojn", "shoes": "ŝuojn", "chairs": "seĝojn", "tables": "tablojn",
    "books": "librojn", "cups": "tasojn", "plates": "telerojn", "bags": "sakojn",
    "boots": "botojn", "hats": "ĉapelojn", "coats": "mantelojn", "rugs": "tapiŝojn",
    "clocks": "horloĝojn", "mirrors": "spegulojn", "pillows": "kusenojn", "towels": "mantukojn",
    "vases": "vazojn", "bottles": "botelojn", "knives": "tranĉilojn", "forks": "forkojn",
    "spoons": "kulerojn", "pens": "plumojn", "pots": "potojn", "pans": "patojn",
    "baskets": "korbojn", "candles": "kandelojn", "curtains": "kurtenojn",
    "blankets": "kovrilojn", "radios": "radiojn", "cameras": "fotilojn", "rings": "ringojn",
    "belts": "zonojn", "scarves": "skarpojn", "gloves": "gantojn", "shirts": "ĉemizojn",
    "umbrellas": "ombrelojn", "toys": "ludilojn", "drums": "tamburojn", "flutes": "flutojn",
    "guitars": "gitarojn", "bikes": "biciklojn", "tents": "tendojn", "ropes": "ŝnurojn",
    "hammers": "martelojn",
}  # fmt: skip
COLOURS = {
    "red": "ruĝajn", "blue": "bluajn", "green": "verdajn", "yellow": "flavajn",
    "black": "nigrajn", "white": "blankajn", "brown": "brunajn", "pink": "rozajn",
    "grey": "grizajn", "orange": "oranĝajn", "purple": "purpurajn", "golden": "orajn",
}  # fmt: skip
VERBS = {"ordered": "mendis", "bought": "aĉetis", "received": "ricevis", "picked": "elektis"}
GLAD = ("happy", "pleased", "delighted", "glad", "thrilled", "satisfied", "content", "impressed")
SAD = ("unhappy", "annoyed", "upset", "angry", "sad", "disappointed", "furious", "worried")
ADVERBS = ("very", "truly", "really", "quite", "so", "rather", "deeply", "extremely")


def split_words(text: str) -> tuple[str, ...]:
    """Split a text into words: a long list is easier to read and extend without quotes."""
    return tuple(text.split())


# Few enough that each syllable becomes one token, seen often enough to be copied reliably.
ONSETS = split_words("b br d f g h j k l m n p r st t v w z")
VOWELS = split_words("a e i o u")
CODAS = ("", *split_words("n r l"))
TOWNS = split_words("ton burg ford ville dale holm stad wick")


def split_of(value: str) -> Split:
    """Return the split of a name, number or pair ("red lamps"), from its text alone."""
    digest = hashlib.blake2b(value.encode(), digest_size=8).digest()
    return BUCKETS[int.from_bytes(digest, "big") % len(BUCKETS)]


class Words:
    """Draws words that belong to one split, from the caller's random source."""

    def __init__(self, rng: random.Random, split: Split) -> None:
        self.rng = rng
        self.split = split

    def name(self) -> str:
        """Draw a name of one or two words."""
        words = [self._name_word() for _ in range(self.rng.randint(1, 2))]
        return " ".join(words)

    def city(self) -> str:
        return self._owned(lambda: self._first_syllable() + self.rng.choice(TOWNS))

    def number(self, low: int, high: int) -> str:
        return self._owned(lambda: str(self.rng.randint(low, high)))

    def scribble(self) -> str:
        """Draw random letters, to practise copying words that do not look like names."""
        letters = "abcdefghijklmnopqrstuvwxyz"
        length = self.rng.randint(2, 6)
        return self._owned(lambda: "".join(self.rng.choices(letters, k=length)).capitalize())

    def item(self) -> tuple[str, str]:
        """Draw a colour and a noun whose combination belongs to the split."""
        return self._pair(list(COLOURS), list(NOUNS))

    def feeling(self, adjectives: Sequence[str]) -> tuple[str, str]:
        """Draw an adverb and an adjective whose combination belongs to the split."""
        return self._pair(ADVERBS, adjectives)

    def _pair(self, firsts: Sequence[str], seconds: Sequence[str]) -> tuple[str, str]:
        pair = self._owned(lambda: f"{self.rng.choice(firsts)} {self.rng.choice(seconds)}")
        first, second = pair.split()
        return first, second

    def _name_word(self) -> str:
        return self._owned(lambda: self._first_syllable() + self._last_syllable())

    def _first_syllable(self) -> str:
        return (self.rng.choice(ONSETS) + self.rng.choice(VOWELS)).capitalize()

    def _last_syllable(self) -> str:
        choice = self.rng.choice
        return choice(ONSETS) + choice(VOWELS) + choice(CODAS)

    def _owned(self, draw: Callable[[], str]) -> str:
        while split_of(word := draw()) is not self.split:
            pass
        return word


def distinct(draw: Callable[[], T], count: int) -> list[T]:
    """Draw until there are `count` distinct values; return them in the order drawn."""
    found: dict[T, None] = {}
    while len(found) < count:
        found.setdefault(draw())
    return list(found)
