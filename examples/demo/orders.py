"""An order: the sentence that the demo's adapters read, and the facts in it.

Facts and wording only; what is asked about an order is in `lessons` and `jobs`.
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
# Were "not" as frequent as its absence, adjectives alone would say nothing about moods, and
# training would sit for minutes on the plateau that learning an exclusive or begins with.
NOT_SHARE = 0.15


class Example(NamedTuple):
    """What the user says and what the model should answer."""

    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class Mood:
    """How a sentence ends, and what that says about the customer."""

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
        """The same sentence with other values in it."""
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
