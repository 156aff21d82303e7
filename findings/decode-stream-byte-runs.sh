#!/usr/bin/env bash
# tokenizers' DecodeStream contradicts `decode` on runs of byte tokens, and then raises.
#
# Versions:  tokenizers 0.23.3
# Expected:  the pieces that DecodeStream.step returns add up to the decoding of all ids, but for an
#            unfinished character at the end. In a vocabulary with ByteFallback (Llama 2, Mistral,
#            Gemma), "A" as the byte token <0x41> and then a lone <0xC3> should be "A" and U+FFFD.
# Seen:      ByteFallback decodes a run of byte tokens as a whole: one bad byte makes every byte of
#            the run U+FFFD, the "A" before it too. The stream has given "A" out by then, and the next
#            token that ends the run raises "Invalid prefix encountered while decoding stream". A
#            model may sample such ids at any time. (2026-11-30)
# Matters:   a server that streams with DecodeStream ends that request with an error, and one that
#            skips the error shows other text in a stream than in the whole answer. Safe is to hold
#            byte tokens back until their run ends.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check tokenizers==0.23.3
"$folder/venv/bin/python" - <<'PYTHON'
import sys

from tokenizers import Tokenizer, decoders, models
from tokenizers.decoders import DecodeStream

BYTES = {f"<0x{value:02X}>": 1 + value for value in range(256)}
VOCAB = {"<unk>": 0, **BYTES, "c": 257}
tokenizer = Tokenizer(models.BPE(VOCAB, [], byte_fallback=True, unk_token="<unk>"))
tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])


def streamed(ids: list[int]) -> str:
    stream, text = DecodeStream(ids=[]), ""
    for token_id in ids:
        try:
            text += stream.step(tokenizer, token_id) or ""
        except Exception as error:
            return f"{text!r}, then {type(error).__name__}: {str(error).split('.')[0]}"
    return repr(text)


seen = []
for tokens in (["<0x41>", "c"], ["<0xC3>", "<0xA9>", "c"], ["<0x41>", "<0xC3>", "c"]):
    ids = [VOCAB[token] for token in tokens]
    whole, parts = repr(tokenizer.decode(ids)), streamed(ids)
    seen.append(whole == parts)
    print(f"{tokens}: decode {whole}, stream {parts}")
if seen != [True, True, False]:
    sys.exit("changed: this finding no longer holds")
PYTHON
