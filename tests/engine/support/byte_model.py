"""Writes a tiny random model with a tokenizer of bytes and of some longer tokens."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.engine.support.tiny import Tiny, write_tiny

# Tokens that cross the borders of JSON's own, and that are cut out of names
LONGER = ['{"', '":', '": ', '",', "}}", "true", "null", "na", "me", "12", "\\n", "é", " a"]
EOS, PAD, EOT = "<eos>", "<pad>", "<eot>"
PADDING_ROWS = 5  # of the embedding, without a token


def byte_tokenizer() -> Tokenizer:
    """Make a tokenizer: ids below 256 are the bytes; then LONGER, then the special tokens."""
    by_byte = _alphabet()
    vocabulary = {by_byte[byte]: byte for byte in range(256)}
    merges: list[tuple[str, str]] = []
    for text in LONGER:
        characters = [by_byte[byte] for byte in text.encode()]
        for end in range(2, len(characters) + 1):
            whole = "".join(characters[:end])
            if whole not in vocabulary:
                vocabulary[whole] = len(vocabulary)
                merges.append(("".join(characters[: end - 1]), characters[end - 1]))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([EOS, PAD, EOT])
    return tokenizer


def token_bytes(tokenizer: Tokenizer) -> dict[int, bytes]:
    """Map every token but the special ones to its bytes."""
    byte_of = {character: byte for byte, character in _alphabet().items()}
    return {
        token_id: bytes(byte_of[c] for c in token)
        for token, token_id in tokenizer.get_vocab(with_added_tokens=False).items()
    }


def write_byte_model(folder: Path, **changes: Any) -> Tiny:
    """Write a tiny model of these tokens; it has two end tokens."""
    tokenizer = byte_tokenizer()
    ids = {name: tokenizer.token_to_id(name) for name in (EOS, PAD, EOT)}
    size = tokenizer.get_vocab_size() + PADDING_ROWS
    tiny = write_tiny(
        folder,
        **{
            "vocab_size": size,
            "max_position_embeddings": 1024,
            "eos_token_id": [ids[EOS], ids[EOT]],
            "pad_token_id": ids[PAD],
            **changes,
        },
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return tiny


def _alphabet() -> dict[int, str]:
    """List tokenizers' own characters for the bytes: printable ones stand for themselves."""
    own = set(pre_tokenizers.ByteLevel.alphabet())
    rest = [byte for byte in range(256) if chr(byte) not in own]
    others = {byte: chr(256 + n) for n, byte in enumerate(rest)}
    return {byte: others.get(byte, chr(byte)) for byte in range(256)}
