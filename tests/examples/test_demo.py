"""The demo's words never cross splits, its answers parse, and its making survives interruption."""

import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from examples.demo import parts
from examples.demo.jobs import COLUMNS, JOBS, examples_of
from examples.demo.lessons import (
    LESSONS,
    LEXICON,
    answer_questions,
    draw_lesson,
    look_up_esperanto,
    repeat,
    understand,
)
from examples.demo.make import OtherDemo, ensure_demo
from examples.demo.model import MAX_LENGTH, new_model
from examples.demo.orders import Example
from examples.demo.parts import draw_held_out
from examples.demo.recipe import ADAPTERS, DEFAULT_RECIPE, Recipe
from examples.demo.tokenizer import as_chat, tokenize, train_tokenizer
from examples.demo.train import ExampleSource, exact_match
from examples.demo.words import ADVERBS, COLOURS, GLAD, NOUNS, SAD, Split, Words, distinct, split_of

# peft asks transformers by its old name whether gradient checkpointing is on.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

TINY = replace(
    DEFAULT_RECIPE,
    vocab_size=600,
    tokenizer_lessons=300,
    tokenizer_names=100,
    hidden_size=128,
    num_layers=3,
    batch_size=4,
    base_steps=2,
    adapters=(replace(ADAPTERS[0], steps=2), replace(ADAPTERS[4], steps=2)),
    max_rounds=2,
    num_tuning=4,
    num_held_out=4,
)


# ==== splits ====


def words_of(split: Split, seed: int = 0) -> Words:
    return Words(random.Random(seed), split)


def job_examples(split: Split, count: int) -> list[Example]:
    return [job.draw(words_of(split, seed)) for job in JOBS.values() for seed in range(count)]


def values_in(examples: list[Example]) -> set[str]:
    """Every name, city and number in the texts, found by their looks and not by the generator."""
    text = " ".join(f"{e.prompt} {e.answer}" for e in examples)
    invented = {word for word in re.findall(r"\b[A-Z][a-z]+\b", text) if word not in WORDING}
    return invented | set(re.findall(r"\d+", text))


WORDING = {"Show", "List", "What", "How", "Dear"}


def pairs_in(examples: list[Example]) -> set[tuple[str, str]]:
    """Every colour with its noun and every adverb with its adjective ("not" is everybody's)."""
    found: set[tuple[str, str]] = set()
    for example in examples:
        words = re.findall(r"[a-z]+", example.prompt)
        for first, second in pairwise(words):
            if first in COLOURS and second in NOUNS:
                found.add((first, second))
            if first in ADVERBS and second in (*GLAD, *SAD):
                found.add((first, second))
    return found


def test_the_splits_share_no_name_no_city_no_number_and_no_pair() -> None:
    seen = {split: job_examples(split, 400) for split in Split}
    for one, other in ((Split.TRAIN, Split.TUNE), (Split.TRAIN, Split.HELD_OUT)):
        assert not values_in(seen[one]) & values_in(seen[other])
        assert not pairs_in(seen[one]) & pairs_in(seen[other])
    assert not values_in(seen[Split.TUNE]) & values_in(seen[Split.HELD_OUT])
    assert all(len(values_in(examples)) > 200 for examples in seen.values())
    assert all(len(pairs_in(examples)) > 50 for examples in seen.values())


def test_the_base_never_reads_a_held_out_value_or_pair() -> None:
    words, held_out = words_of(Split.TRAIN), job_examples(Split.HELD_OUT, 400)
    lessons = [draw_lesson(words) for _ in range(4000)]
    assert not values_in(lessons) & values_in(held_out)
    # The other lessons put words side by side at random, as lists to copy or patterns to fill.
    meaningful = (repeat, answer_questions, understand, look_up_esperanto)
    phrases = [lesson(words) for lesson in meaningful for _ in range(500)]
    assert len(pairs_in(phrases)) > 300
    assert not pairs_in(phrases) & pairs_in(held_out)


@pytest.mark.parametrize("name", JOBS)
def test_no_held_out_prompt_can_be_met_in_training(name: str) -> None:
    held_out = {example.prompt for example in draw_held_out(DEFAULT_RECIPE)[name]}
    train = words_of(Split.TRAIN)
    met = {JOBS[name].draw(train).prompt for _ in range(5000)}
    assert len(held_out) == DEFAULT_RECIPE.num_held_out
    assert not held_out & met
    # Not by luck of the draw: each has a value or a pair that only held-out prompts may have.
    for prompt in held_out:
        example = [Example(prompt, "")]
        telling = [*values_in(example), *map(" ".join, pairs_in(example))]
        assert any(split_of(word) is Split.HELD_OUT for word in telling), prompt


def test_measuring_on_the_train_split_is_refused() -> None:
    with pytest.raises(ValueError, match="TUNE or HELD_OUT"):
        examples_of(JOBS["sql"], words_of(Split.TRAIN), 3)


def test_the_same_seed_draws_the_same_lessons() -> None:
    one, same, other = (words_of(Split.TRAIN, seed) for seed in (1, 1, 2))
    lessons = [[draw_lesson(words) for _ in range(50)] for words in (one, same, other)]
    assert lessons[0] == lessons[1] != lessons[2]


def test_distinct_things_come_in_the_order_of_drawing() -> None:
    drawn = iter("abacab")
    assert distinct(lambda: next(drawn), 3) == ["a", "b", "c"]


# ==== jobs ====


def held_out(name: str) -> list[Example]:
    return examples_of(JOBS[name], words_of(Split.HELD_OUT), 200)


def test_every_query_is_a_select_with_the_values_of_its_question() -> None:
    shape = re.compile(
        rf"SELECT ({'|'.join(COLUMNS)}|COUNT\(\*\)) FROM ({'|'.join(NOUNS)}) "
        r"WHERE \w+ (= '\w+'|[<>] \d+)( AND \w+ (= '\w+'|[<>] \d+)){0,2};"
    )
    for prompt, sql in held_out("sql"):
        assert shape.fullmatch(sql), sql
        for value in re.findall(r"'(\w+)'|[<>] (\d+)", sql):
            assert "".join(value) in re.findall(r"\w+", prompt)


def test_every_extraction_is_json_with_the_sentence_s_facts() -> None:
    for prompt, answer in held_out("json"):
        customer = json.loads(answer)
        assert list(customer) == ["name", "city", "age"]
        assert all(str(value) in prompt for value in customer.values())


def test_redaction_leaves_no_value_and_changes_nothing_else() -> None:
    for prompt, answer in held_out("redact"):
        assert not values_in([Example(answer, "")])
        kept = re.split(r"\[NAME\]|\[CITY\]|\[NUMBER\]", answer)
        assert re.fullmatch(".+".join(map(re.escape, kept)), prompt)


def test_moods_are_all_met_and_not_turns_them_round() -> None:
    answers = dict(held_out("mood"))
    assert set(answers.values()) == {"positive", "negative", "neutral"}
    for prompt, label in answers.items():
        glad = any(f" {word} " in prompt for word in GLAD)
        sad = any(f" {word} " in prompt for word in SAD)
        expected = "positive" if glad != (" not " in prompt) else "negative"
        assert label == (expected if glad or sad else "neutral")


def test_jobs_on_orders_are_asked_about_the_very_same_sentences() -> None:
    drawn = draw_held_out(DEFAULT_RECIPE)
    sentences = [[e.prompt for e in drawn[name]] for name in drawn if name != "sql"]
    assert len(sentences) == 5
    assert all(prompts == sentences[0] for prompts in sentences)


# ==== tokenizer ====


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = words_of(Split.TRAIN)
    texts = [text for _ in range(500) for text in draw_lesson(words)]
    return train_tokenizer([*texts, " ".join(LEXICON)], 700, MAX_LENGTH)


def test_any_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [text for example in job_examples(Split.HELD_OUT, 20) for text in example]
    for text in (*texts, "tabs\tand\nlines", "ŝuo ĉ 漢字 🙂", "  two  spaces  ", "snake_case"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_a_name_is_the_same_tokens_in_prose_in_quotes_and_in_json(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    for text in ("from Stiaford, aged", "'Stiaford'", '{"city": "Stiaford"}'):
        assert " ".join(map(str, ids("Stiaford"))) in " ".join(map(str, ids(text)))


def test_the_chat_template_takes_three_roles_and_refuses_others(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    messages = [
        {"role": role, "content": role[0]} for role in ("system", "user", "assistant", "user")
    ]
    chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat == (
        "<|bos|><|system|>s<|end|><|user|>u<|end|><|assistant|>a<|end|><|user|>u<|end|><|assistant|>"
    )
    with pytest.raises(Exception, match="role tool is not system, user or assistant"):
        tokenizer.apply_chat_template([{"role": "tool", "content": ""}], tokenize=False)


def test_an_answer_is_tokenized_as_the_template_would_write_it(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    prompt, answer = example = JOBS["json"].draw(words_of(Split.TUNE))
    (tokens,) = tokenize(tokenizer, [as_chat(tokenizer, prompt)], [example])
    spoken = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    whole = tokenizer.apply_chat_template(spoken, tokenize=True, return_dict=False)
    assert [*tokens.prompt_ids, *tokens.answer_ids] == whole
    assert tokens.answer_ids[-1] == tokenizer.eos_token_id


# ==== training and measuring ====


def test_batches_weigh_prompts_answers_and_padding_apart(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    rng = random.Random(0)
    words = Words(rng, Split.TRAIN)
    source = ExampleSource(tokenizer, lambda: draw_lesson(words), rng, 4, prompt_weight=0.25)
    batches = list(source.batches(20))
    assert len(batches) == 20
    for batch in batches:
        assert batch.token_ids.shape == batch.weights.shape
        for ids, weights in zip(batch.token_ids.tolist(), batch.weights.tolist(), strict=True):
            start = ids.index(tokenizer.convert_tokens_to_ids("<|assistant|>")) + 1
            end = len(ids) - ids[::-1].index(tokenizer.eos_token_id)
            assert weights == [0.25] * start + [1.0] * (end - start) + [0.0] * (len(ids) - end)


def test_exact_match_counts_an_answer_that_does_not_end_as_wrong(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    torch.manual_seed(0)
    model = new_model(tokenizer, hidden_size=128, num_layers=3).eval()
    spoken = make_answer(model, tokenizer, "Hello", 3)
    right_but_going_on = Example("Hello", spoken)
    assert tokenizer.eos_token_id not in tokenizer.encode(spoken)
    assert exact_match(model, tokenizer, [right_but_going_on]) == 0.0


def make_answer(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, prompt: str, length: int
) -> str:
    inputs = tokenizer(as_chat(tokenizer, prompt), return_tensors="pt", add_special_tokens=False)
    tokens = model.generate(inputs["input_ids"], max_new_tokens=length, do_sample=False)
    return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :])


# ==== making ====


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_an_interrupted_making_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, made = tmp_path / "demo", []
    train_adapter = parts.make_adapter

    def interrupted(folder: Path, **rest: object) -> None:
        made.append(folder.name)
        if len(made) == 2:
            (folder / "adapter_config.json").write_text("{half")
            raise KeyboardInterrupt
        train_adapter(folder, **rest)

    monkeypatch.setattr(parts, "make_adapter", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ensure_demo(out, TINY)
    assert [path.name for path in sorted((out / "adapters").iterdir())] == ["sql"]
    assert not (out / "report.json").exists()
    kept = {p: p.stat().st_mtime_ns for p in (*out.glob("base/*"), *out.glob("adapters/sql/*"))}

    # A run that was killed outright leaves its temporary folder behind.
    (out / "adapters" / ".reply-killed").mkdir()
    assert ensure_demo(out, TINY) == out
    assert made == ["sql", "reply", "reply"]
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert [path.name for path in sorted((out / "adapters").iterdir())] == ["reply", "sql"]

    # Nothing is made or touched once all is there.
    monkeypatch.setattr(parts, "make_adapter", None)
    files = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    ensure_demo(out, TINY)
    assert files == {p: p.stat().st_mtime_ns for p in out.rglob("*")}

    check_folders(out, TINY)
    with pytest.raises(OtherDemo, match="seed 0, not 7"):
        ensure_demo(out, replace(TINY, seed=7, adapters=ADAPTERS))


def check_folders(out: Path, recipe: Recipe) -> None:
    """What was made is what the docstring of `make` says, and loads as any model would."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out / "base")
    alone = Tokenizer.from_file(str(out / "base" / "tokenizer.json"))
    for prompt, answer in draw_held_out(recipe)["reply"]:
        for text in (as_chat(tokenizer, prompt), answer):
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert alone.encode(text, add_special_tokens=False).ids == ids
    model = AutoModelForCausalLM.from_pretrained(out / "base")
    assert model.dtype is torch.float32
    assert model.config.max_position_embeddings >= 1024
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.eos_token == "<|end|>"
    reply = PeftModel.from_pretrained(model, out / "adapters" / "reply").peft_config["default"]
    assert (reply.r, reply.use_rslora) == (32, True)

    held_out = json.loads((out / "heldout.json").read_text())
    report = json.loads((out / "report.json").read_text())
    assert list(held_out) == list(report["adapters"]) == ["sql", "reply"]
    for name, examples in held_out.items():
        assert [Example(**e) for e in examples] == draw_held_out(recipe)[name]
        assert 0.0 <= report["adapters"][name]["exact_match"] <= 1.0
        assert 1 <= len(report["adapters"][name]["rounds"]) <= recipe.max_rounds


def test_finding_a_made_demo_imports_nothing_heavy() -> None:
    code = (
        "import sys, examples.demo.make; "
        "assert not {'torch', 'peft', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_lesson_can_be_drawn() -> None:
    for lesson in LESSONS:
        prompt, answer = lesson(words_of(Split.TRAIN))
        assert prompt and answer


def test_the_adapters_have_different_ranks_and_modules_and_one_is_rank_stabilised() -> None:
    assert [adapter.job for adapter in ADAPTERS] == list(JOBS)
    assert len({adapter.rank for adapter in ADAPTERS}) >= 3
    assert len({adapter.target_modules for adapter in ADAPTERS}) >= 2
    assert sum(adapter.use_rslora for adapter in ADAPTERS) == 1
