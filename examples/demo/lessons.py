"""Defines what the base model learns: to read orders and handle words, in formats of its own.

The lessons teach skills (find a fact, copy any word or mark, tell glad from sad, a little
Esperanto) so that an adapter only has to learn a format. Only the train split is ever used.
"""

from collections.abc import Callable

from examples.demo.jobs import COLUMNS
from examples.demo.orders import NOT_SHARE, Example, Order, draw_order
from examples.demo.words import ADVERBS, COLOURS, GLAD, NOUNS, SAD, VERBS, Words, split_words

QUESTIONS = {
    "name": "Who?",
    "city": "Where?",
    "age": "How old?",
    "count": "How many?",
    "colour": "What colour?",
    "noun": "What?",
    "happy": "Happy?",
}
HAPPY = {"positive": "yes", "negative": "no", "neutral": "unclear"}

# The lessons must contain all tokens of the jobs' answers: tokens that the base never saw have
# nearly equal embeddings, and an adapter on the layers cannot tell them apart.
PHRASES = split_words(
    """Dear we are sorry glad thank you that like about for telling us your el positive negative
    neutral SELECT FROM WHERE AND COUNT NAME CITY NUMBER name city age colour"""
)
MARKS = split_words(
    """[ ] { } ( ) < > = * + - / : ; , . ! ? _ % & # @ ' " [' '] {" "} (*) () ": ", "; '; ' ">"""
)
LEXICON = (
    *(word for pair in (NOUNS | COLOURS | VERBS).items() for word in pair),
    *(*GLAD, *SAD, *ADVERBS, *COLUMNS, *PHRASES),
)


def draw_lesson(words: Words) -> Example:
    lesson = words.rng.choices(list(LESSONS), weights=list(LESSONS.values()))[0]
    return lesson(words)


def repeat(words: Words) -> Example:
    """Repeat a text that asks no question, which the base also does when served."""
    text = draw_order(words).text()
    return Example(text, text)


def answer_questions(words: Words) -> Example:
    facts, text = _draw_facts(words)
    asked = _some_fields(words)
    questions = " ".join(QUESTIONS[field] for field in asked)
    return Example(f"{text} {questions}", ", ".join(facts[field] for field in asked))


def fill(words: Words) -> Example:
    """Put facts into a pattern of words and marks."""
    facts, text = _draw_facts(words)
    pattern, filled = "", ""
    for field in _some_fields(words):
        before, after = _maybe_mark(words), _maybe_mark(words)
        if words.rng.random() < 0.25:
            after += f" {_any_word(words)}"
        pattern += f" {before}<{field}>{after}"
        filled += f" {before}{facts[field]}{after}"
    return Example(f"{text} Fill:{pattern}", filled.strip())


def handle(words: Words) -> Example:
    """Copy or quote a list of words, or name its first."""
    listed = [_any_word(words) for _ in range(words.rng.randint(2, 7))]
    results = {
        "Copy": " ".join(listed),
        "Quote": " ".join(f"'{word}'" for word in listed),
        "First": listed[0],
    }
    task = words.rng.choice(list(results))
    return Example(f"{task}: {' '.join(listed)}", results[task])


def understand(words: Words) -> Example:
    """Ask whether a feeling is nice, sometimes after a "not"."""
    glad = words.rng.random() < 0.5
    adverb, adjective = words.feeling(GLAD if glad else SAD)
    if words.rng.random() < NOT_SHARE:
        adverb, glad = "not", not glad
    return Example(f"Is it nice to be {adverb} {adjective}?", "yes" if glad else "no")


def look_up_esperanto(words: Words) -> Example:
    colour, noun = words.item()
    if words.rng.random() < 0.2:
        verb = words.rng.choice(list(VERBS))
        return Example(f"Esperanto: {verb}", VERBS[verb])
    return Example(f"Esperanto: {colour} {noun}", f"{COLOURS[colour]} {NOUNS[noun]}")


LESSONS: dict[Callable[[Words], Example], int] = {
    repeat: 10,
    answer_questions: 32,
    fill: 20,
    handle: 20,
    understand: 12,
    look_up_esperanto: 6,
}


def _draw_facts(words: Words) -> tuple[dict[str, str], str]:
    """Draw an order; return the answers to all QUESTIONS about it, and its text."""
    order = draw_order(words)
    return _facts(order), order.text()


def _facts(order: Order) -> dict[str, str]:
    return {
        "name": order.name,
        "city": order.city,
        "age": order.age,
        "count": order.count,
        "colour": order.colour,
        "noun": order.noun,
        "happy": HAPPY[order.mood.label],
    }


def _some_fields(words: Words) -> list[str]:
    return words.rng.sample(list(QUESTIONS), words.rng.randint(1, 3))


def _maybe_mark(words: Words) -> str:
    return words.rng.choice(("", words.rng.choice(MARKS)))


def _any_word(words: Words) -> str:
    draws: tuple[Callable[[], str], ...] = (
        words.name,
        words.city,
        words.scribble,
        lambda: words.number(10, 400),
        lambda: words.rng.choice(LEXICON),
        lambda: words.rng.choice(LEXICON),
        lambda: words.rng.choice(PHRASES),
        lambda: words.rng.choice(MARKS),
    )
    return words.rng.choice(draws)()
