"""Trains the demo's tokenizer: a small byte-level BPE with a chat template; tokenizes examples.

Load it with PreTrainedTokenizerFast, or from tokenizer.json alone. AutoTokenizer treats every
folder with a Qwen2 model as one of Qwen's own and splits words in Qwen's way, ignoring the folder.
"""

from collections.abc import Iterable
from typing import NamedTuple

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from examples.demo.orders import Example

PAD, BOS, END = "<|pad|>", "<|bos|>", "<|end|>"
ROLES = ("system", "user", "assistant")
SPECIAL_TOKENS = (PAD, BOS, END, *(f"<|{role}|>" for role in ROLES))

# A lower-case or all-capital word includes the space before it; a capitalised word and a digit do
# not. So a name or a number has the same tokens in prose, in quotes and in JSON. The first syllable
# of a capitalised word is a piece of its own: a model copies a word by looking for the token that
# followed its last one, and a single initial would too often be shared by several names.
PIECES = r" ?\p{Ll}+| ?\p{Lu}{2,}|\p{Lu}[bcdfghjklmnpqrstvwxyz]*[aeiou]*|\p{Lu}|\d| ?[^\w\s]+|\s|."

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('role ' + message['role'] + ' is not system, user or assistant') }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


class TokenizedExample(NamedTuple):
    prompt_ids: list[int]
    answer_ids: list[int]  # ends with the end-of-turn token

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.answer_ids)


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, max_length: int
) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=END,
        chat_template=CHAT_TEMPLATE,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def as_chat(tokenizer: PreTrainedTokenizerFast, prompt: str, system: str | None = None) -> str:
    """Format the prompt for the model to answer, with the template that serving uses too."""
    messages = [{"role": "user", "content": prompt}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def tokenize(
    tokenizer: PreTrainedTokenizerFast, chats: list[str], examples: list[Example]
) -> list[TokenizedExample]:
    prompts = tokenizer(chats, add_special_tokens=False)["input_ids"]
    answers = tokenizer([e.answer + END for e in examples], add_special_tokens=False)["input_ids"]
    return [TokenizedExample(*pair) for pair in zip(prompts, answers, strict=True)]
