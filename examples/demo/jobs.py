"""Defines what the adapters learn: six jobs, five of them on the same sentences.

Each job draws a prompt and its only correct answer. Independent of models and training.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass

from examples.demo.orders import Example, Order, draw_order
from examples.demo.words import COLOURS, NOUNS, VERBS, Split, Words, distinct

COLUMNS = ("price", "size", "weight", "brand", "name", "rating")
COMPARISONS = {"under": "<", "below": "<", "over": ">", "above": ">"}
THANKS = {
    "positive": "we are glad that you like your",
    "negative": "we are sorry about your",
    "neutral": "thank you for telling us about your",
}


@dataclass(frozen=True, slots=True)
class Job:
    """One job; `draw` makes an example from the words of a given split."""

    description: str
    draw: Callable[[Words], Example]


def on_order(answer: Callable[[Order], str]) -> Callable[[Words], Example]:
    """Make a job that reads an order. Equal random sources give equal orders in all jobs."""

    def draw(words: Words) -> Example:
        order = draw_order(words)
        return Example(order.text(), answer(order))

    return draw


def extract(order: Order) -> str:
    return json.dumps({"name": order.name, "city": order.city, "age": int(order.age)})


def redact(order: Order) -> str:
    return order.retold("[NAME]", "[CITY]", "[NUMBER]", "[NUMBER]")


def judge(order: Order) -> str:
    return order.mood.label


def reply(order: Order) -> str:
    thanks = THANKS[order.mood.label]
    return f"Dear {order.name}, {thanks} {order.count} {order.colour} {order.noun}."


def translate(order: Order) -> str:
    things = f"{order.count} {COLOURS[order.colour]} {NOUNS[order.noun]}"
    return f"{order.name} el {order.city} {VERBS[order.verb]} {things}."


def draw_query(words: Words) -> Example:
    """Draw a question about a shop's stock, and the SQL that answers it."""
    rng = words.rng
    column = rng.choice(COLUMNS)
    question, selected, mark = rng.choice(
        (
            (f"Show the {column} of all", column, "."),
            (f"List the {column} of our", column, "."),
            (f"What is the {column} of the", column, "?"),
            ("How many", "COUNT(*)", "?"),
        )
    )
    colour, noun = words.item()
    conditions: list[str] = []
    if has_colour := rng.random() < 0.6:
        question += f" {colour}"
        conditions.append(f"colour = '{colour}'")
    question += f" {noun}"
    # A question with neither colour nor city could have occurred in training.
    if not has_colour or rng.random() < 0.4:
        city = words.city()
        question += rng.choice((f" from {city}", f" made in {city}"))
        conditions.append(f"city = '{city}'")
    if rng.random() < 0.5:
        comparison, price = rng.choice(list(COMPARISONS)), words.number(10, 400)
        question += f" {comparison} {price}"
        conditions.append(f"price {COMPARISONS[comparison]} {price}")
    sql = f"SELECT {selected} FROM {noun} WHERE {' AND '.join(conditions)};"
    return Example(question + mark, sql)


JOBS = {
    "sql": Job("turns a question about the stock into SQL", draw_query),
    "json": Job("extracts the customer as JSON", on_order(extract)),
    "mood": Job("says whether the customer is positive, negative or neutral", on_order(judge)),
    "redact": Job("hides names, cities and numbers", on_order(redact)),
    "reply": Job("answers the customer politely", on_order(reply)),
    "esperanto": Job("says in Esperanto who bought what", on_order(translate)),
}


def examples_of(job: Job, words: Words, count: int) -> list[Example]:
    """Draw `count` distinct examples, for measuring."""
    if words.split is Split.TRAIN:
        raise ValueError("measuring on the train split would measure memory: use TUNE or HELD_OUT")
    return distinct(lambda: job.draw(words), count)
