"""Draws orders: the sentences that the demo's adapters read, and the facts in them.

Facts and wording only; the questions about an order are in `lessons` and `jobs`.
"""

from dataclasses import dataclass
from typing import NamedTuple

from examples.demo.words import GLAD, SAD, VERBS, Words

SUBJECTS = (
    "{name} from {city}, aged {age},",
    "{name}, {age} years old and living in {city},",
    "{name}, a {age} year old from {city},",
    "{age} year old {name} of {city}",
)
OPINIONLESS = ("gave no opinion.", "has not opened them yet.", "will write again later.")
# If "not" were as frequent as its absence, an adjective alone would not predict the mood, and
# training would stay for minutes on the plateau at the start of learning an exclusive or.
NOT_SHARE = 0.15


class Example(NamedTuple):
    """A user's prompt and the answer that the model should give."""

    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class Mood:
    """The end of a sentence, and the customer's mood that it expresses."""

    ending: str
    label: str  # positive, negative or neutral


@dataclass(frozen=True, slots=True)
class Order:
    name: str
    city: str
    age: str
    count: str
    colour: str
    noun: str
    verb: str
    subject: str  # one of SUBJECTS
    mood: Mood

    def text(self) -> str:
        return self.retold(self.name, self.city, self.age, self.count)

    def retold(self, name: str, city: str, age: str, count: str) -> str:
        """Return the sentence with other values."""
        subject = self.subject.format(name=name, city=city, age=age)
        return f"{subject} {self.verb} {count} {self.colour} {self.noun} and {self.mood.ending}"


def draw_order(words: Words) -> Order:
    colour, noun = words.item()
    return Order(
        name=words.name(),
        city=words.city(),
        age=words.number(18, 99),
        count=words.number(10, 99),
        colour=colour,
        noun=noun,
        verb=words.rng.choice(list(VERBS)),
        subject=words.rng.choice(SUBJECTS),
        mood=_draw_mood(words),
    )


def _draw_mood(words: Words) -> Mood:
    rng = words.rng
    if rng.random() < 0.2:
        return Mood(rng.choice(OPINIONLESS), "neutral")
    glad = rng.random() < 0.5
    adverb, adjective = words.feeling(GLAD if glad else SAD)
    if rng.random() < NOT_SHARE:
        adverb, glad = "not", not glad
    verb, preposition = rng.choice(("was", "felt", "is")), rng.choice(("with", "about"))
    ending = f"{verb} {adverb} {adjective} {preposition} them."
    return Mood(ending, "positive" if glad else "negative")
