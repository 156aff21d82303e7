"""Text from tokens: equal to decoding everything at once, never half a character."""

from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from deployments.text.detokenizer import Detokenizer, StopStrings
from deployments.text.vocabulary import Vocabulary

CORPUS = ["the quick brown fox", "größer als 100 €", "日本語のテキスト", "👩‍👩‍👧 emoji", "a  b   c"]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 20, trainer)
    tokenizer.add_tokens([AddedToken("<tool call>", normalized=False), AddedToken("é!")])
    return tokenizer


def sentencepiece_style() -> Tokenizer:
    """As Llama 2: `▁` for spaces, a token per byte for what has none, a stripped first space."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁the", "▁fox", "a", "b", "ö", "日", "▁▁", "語", "ing"]
    vocabulary = {piece: at for at, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


TOKENIZERS = {"byte-level": byte_level(), "sentencepiece": sentencepiece_style()}
VOCABULARIES = {name: Vocabulary(t, {"eos_token": "</s>"}, None) for name, t in TOKENIZERS.items()}
IDS = st.lists(st.integers(0, 268), max_size=40)  # one id more than the smaller one has
CUTS = st.lists(st.integers(1, 3), max_size=40)


def in_pieces(detokenizer: Detokenizer, token_ids: Sequence[int], cuts: Sequence[int]) -> list[str]:
    deltas: list[str] = []
    rest = list(token_ids)
    for cut in cuts:
        deltas.append(detokenizer.push(rest[:cut]))
        rest = rest[cut:]
    deltas.append(detokenizer.push(rest))
    return [*deltas, detokenizer.flush()]


@pytest.mark.parametrize("name", VOCABULARIES)
@pytest.mark.parametrize("skip", [True, False])
@given(token_ids=IDS, cuts=CUTS)
@example(token_ids=[3, 1, 131], cuts=[1, 1])  # a hidden token between two bytes
@example(token_ids=[3, 400, 131], cuts=[1, 1])  # one that no token has
def test_deltas_add_up_to_the_whole_decoding(
    name: str, skip: bool, token_ids: list[int], cuts: list[int]
) -> None:
    vocabulary = VOCABULARIES[name]
    deltas = in_pieces(vocabulary.detokenizer(skip), token_ids, cuts)
    assert "".join(deltas) == vocabulary.decode(token_ids, skip)


@pytest.mark.parametrize("name", VOCABULARIES)
@given(text=st.text(max_size=30))
def test_a_character_is_never_split(name: str, text: str) -> None:
    vocabulary = VOCABULARIES[name]
    token_ids = vocabulary.encode(text, False)
    wanted = vocabulary.decode(token_ids, True)
    deltas = in_pieces(vocabulary.detokenizer(True), token_ids, [1] * len(token_ids))
    assert "".join(deltas) == wanted
    if "\ufffd" not in wanted:
        assert not any("\ufffd" in delta for delta in deltas)


@given(prompt=st.lists(st.integers(259, 268), min_size=1), token_ids=IDS)
def test_text_after_a_prompt_keeps_its_first_space(prompt: list[int], token_ids: list[int]) -> None:
    vocabulary = VOCABULARIES["sentencepiece"]
    deltas = in_pieces(vocabulary.detokenizer(True, prompt), token_ids, [1] * len(token_ids))
    whole = vocabulary.decode([*prompt, *token_ids], True)
    assert "".join(deltas) == whole[len(vocabulary.decode(prompt, True)) :]


PIECES_OF_PROMPTS = st.sampled_from(["the", " fox", "\n", "é", "😀", "日", "a", "  ", "x = 1\n"])


@given(pieces=st.lists(PIECES_OF_PROMPTS, min_size=1, max_size=8), token_ids=IDS)
@example(pieces=["a", "\n"], token_ids=[259, 260])  # a line that begins with spaces
@example(pieces=["😀", "😀", "😀"], token_ids=[259, 262])  # more bytes than are looked back
def test_text_after_a_prompt_of_bytes_keeps_its_first_space(
    pieces: list[str], token_ids: list[int]
) -> None:
    vocabulary = VOCABULARIES["sentencepiece"]
    prompt = vocabulary.encode("".join(pieces).replace(" ", "▁"), False)
    before = vocabulary.decode(prompt, True)
    deltas = in_pieces(vocabulary.detokenizer(True, prompt), token_ids, [1] * len(token_ids))
    whole = vocabulary.decode([*prompt, *token_ids], True)
    if whole.startswith(before):  # else a bad byte of the answer spoils a character of the prompt
        assert "".join(deltas) == whole[len(before) :]


def test_text_is_given_out_as_soon_as_it_is_certain() -> None:
    vocabulary = VOCABULARIES["byte-level"]
    detokenizer = vocabulary.detokenizer(True)
    deltas = [detokenizer.push([i]) for i in vocabulary.encode("a€b", False)]
    assert deltas[-2:] == ["€", "b"] and "".join(deltas) == "a€b"


def test_the_bytes_of_a_token_are_its_share_of_a_character() -> None:
    vocabulary = VOCABULARIES["byte-level"]
    token_ids = vocabulary.encode("☃", False)
    assert len(token_ids) > 1, "it must not be one token for this test"
    assert b"".join(map(vocabulary.token_bytes, token_ids)) == "☃".encode()


# ---- stop strings --------------------------------------------------------------------------

ALPHABET = "ab."
STOPS = st.lists(st.text(ALPHABET, min_size=1, max_size=4), min_size=1, max_size=4)
PIECES = st.lists(st.text(ALPHABET, max_size=4), max_size=12)


def cut_at_stop(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """Brute force: character by character, until the text ends with a stop string."""
    for end in range(1, len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            longest = max(ended, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(stops=STOPS, pieces=PIECES)
def test_stop_strings_are_found_however_the_text_is_cut(
    stops: list[str], pieces: list[str]
) -> None:
    found = StopStrings(stops)
    shown = ""
    for piece in pieces:
        shown += found.push(piece)
        assert not any(stop in shown for stop in stops)
        if found.hit is not None:
            break
    else:
        shown += found.flush()
    assert (shown, found.hit) == cut_at_stop("".join(pieces), stops)


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    found = StopStrings(["END"])
    pieces = ("abE", "x", "EN", "EN", "D")
    assert [found.push(piece) for piece in pieces] == ["ab", "Ex", "", "EN", ""]
    assert found.hit == "END"
