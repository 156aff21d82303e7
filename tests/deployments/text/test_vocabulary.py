"""Chat templates and tokenizers, with transformers as the oracle; and no torch anywhere."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from deployments.text.chat_template import ChatTemplate, TemplateRefused
from deployments.text.vocabulary import Vocabulary, VocabularyMissing
from tests.deployments.support.fakes import byte_tokenizer, byte_vocabulary

MESSAGES = [
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": "Héllo “you”"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "Bye\n\n  now"},
]
TEMPLATES = {
    "plain": (
        "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m.content }}{{ eos_token }}"
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    ),
    "trimmed": (
        "{% for m in messages %}\n    {% if loop.first %}\n  A{% endif %}\n"
        "{{ m.content | trim }}\n{% endfor %}\n"
    ),
    "json": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}",
    "loop controls": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% continue %}{% endif %}"
        "{{ m.content }}{% endfor %}"
    ),
    "generation": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}{% endgeneration %}{% endif %}{% endfor %}"
    ),
    "namespace": (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
        "{% endfor %}{{ ns.n }} {{ 'tools' if tools else 'no tools' }} "
        "{{ extra | default('none') }}"
    ),
}


def reference(template: str) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer(), bos_token="<pad>", eos_token="<eos>"
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("extra", [{}, {"extra": "given"}])
def test_chats_are_rendered_as_transformers_renders_them(name: str, extra: dict[str, Any]) -> None:
    ours = ChatTemplate(TEMPLATES[name], {"bos_token": "<pad>", "eos_token": "<eos>"})
    wanted = reference(TEMPLATES[name]).apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=True, **extra
    )
    assert ours.render(MESSAGES, True, extra) == wanted


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].content.no.such.thing }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ 1 + 'a' }}",
        "{{ 1 / 0 }}",
        "{{ 10.0 ** 1000 }}",
        "{{ range(10 ** 9) }}",
        "{{ {}['a'].b }}",
    ],
)
def test_a_template_that_refuses_or_leaves_the_sandbox_is_an_error(template: str) -> None:
    with pytest.raises(TemplateRefused):
        ChatTemplate(template, {}).render(MESSAGES, True, {})


@pytest.mark.parametrize("as_file", [True, False])
def test_a_saved_tokenizer_loads_with_its_template(tmp_path: Path, as_file: bool) -> None:
    saved = reference(TEMPLATES["plain"])
    saved.save_pretrained(tmp_path, save_jinja_files=as_file)
    ours = Vocabulary.load(tmp_path)
    text = ours.render(MESSAGES, True, {})
    assert text == saved.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert ours.encode(text, False) == saved.encode(text, add_special_tokens=False)
    assert ours.decode([72, 105, 256], True) == "Hi"


def test_of_several_named_templates_the_default_is_taken(tmp_path: Path) -> None:
    reference("").save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    path = tmp_path / "tokenizer_config.json"
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": named}))
    assert Vocabulary.load(tmp_path).render(MESSAGES, True, {}) == "D"


def test_a_folder_without_a_fast_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VocabularyMissing, match=r"tokenizer\.json"):
        Vocabulary.load(tmp_path)


def test_a_model_without_a_template_says_so() -> None:
    with pytest.raises(TemplateRefused, match="/v1/completions"):
        byte_vocabulary(template=None).render(MESSAGES, True, {})


SYSTEMS = [{"role": "system", "content": "A"}, {"role": "system", "content": "B"}]
USER = {"role": "user", "content": "C"}
LOSES_FIRST = (
    "{% set ns = namespace(s='') %}{% for m in messages %}{% if m.role == 'system' %}"
    "{% set ns.s = m.content %}{% endif %}{% endfor %}"
    "{{ ns.s }}|{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}"
    "{% endfor %}"
)
LOSES_SECOND = (
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}|{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
)
REFUSES_SECOND = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('one system message') }}{% endif %}{{ m.content }}"
    "{% if m.role == 'system' %}|{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("template", [LOSES_FIRST, LOSES_SECOND, REFUSES_SECOND])
def test_leading_system_messages_are_one_where_a_template_takes_one(template: str) -> None:
    ours = ChatTemplate(template, {})
    assert ours.render([*SYSTEMS, USER], True, {}) == "A\n\nB|C"
    assert ours.render([SYSTEMS[0], USER], True, {}) == "A|C"


def test_system_messages_stay_apart_where_a_template_takes_them() -> None:
    ours = ChatTemplate("{% for m in messages %}[{{ m.content }}]{% endfor %}", {})
    assert ours.render([*SYSTEMS, USER], True, {}) == "[A][B][C]"


def test_a_template_without_system_messages_still_refuses_them() -> None:
    template = "{{ raise_exception('no system') if messages[0].role == 'system' else 'ok' }}"
    with pytest.raises(TemplateRefused, match="no system"):
        ChatTemplate(template, {}).render([*SYSTEMS, USER], True, {})


def test_variables_of_the_client_do_not_replace_the_messages() -> None:
    ours = ChatTemplate("{{ messages[0].content }}{{ add_generation_prompt }}", {})
    extra = {"messages": [], "add_generation_prompt": False}
    assert ours.render([USER], True, extra) == "CFalse"


def test_no_token_is_longer_than_the_longest() -> None:
    vocabulary = byte_vocabulary()
    assert vocabulary.longest_token == len("<eos>")


def test_truncation_keeps_added_tokens_as_transformers_does() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A <pad>", special_tokens=[("<eos>", 256), ("<pad>", 257)]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", truncation_side="left"
    )
    expected = {
        most: wrapped("abcdef <eos>gh", truncation=True, max_length=most).input_ids
        for most in (3, 5, 9, 40)
    }
    vocabulary = Vocabulary(tokenizer, {}, None)
    for most, ids in expected.items():
        assert vocabulary.encode_pieces(["abcdef <eos>gh"], True, most, keeps_last=True) == ids
