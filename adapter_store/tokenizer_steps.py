"""Check that the steps of an adapter's tokenizer take time and memory in proportion to the text.

A pattern may take exponential time, and a replacement may make a text as long as it likes. So a
step must be one of its base's, or of a kind that is known here.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from adapter_store.tokenizer_file import Step, TokenizerFile, TokenizerRefused

MAX_TEMPLATE_TOKENS = 64  # that a post-processor adds
_BOUNDED = frozenset(
    (
        *("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents"),
        *("ByteLevel", "Metaspace", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit"),
        *("ByteFallback", "Fuse", "BertProcessing", "RobertaProcessing"),
    )
)
# The words of Qwen2's class, which transformers 5 gives to folders whose file has others.
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PARTS = ("normalizers", "pretokenizers", "processors", "decoders")  # of a Sequence


def check_steps(file: TokenizerFile, base: TokenizerFile) -> None:
    """Raise TokenizerRefused for a step that is neither the base's nor known to be bounded."""
    kinds = [[leaf["type"] for leaf in _leaves(f.steps["decoder"])] for f in (file, base)]
    if kinds[0] != kinds[1]:
        raise TokenizerRefused(f"its decoder has the steps {kinds[0]}, and its base's {kinds[1]}")
    known = {_text(leaf) for step in base.steps.values() for leaf in _leaves(step)}
    patterns = {_text(leaf["pattern"]) for leaf in _all_leaves(base) if "pattern" in leaf}
    patterns.add(_text({"Regex": QWEN2_WORDS}))
    for name, step in file.steps.items():
        for leaf in _leaves(step):
            if _text(leaf) not in known and not _is_bounded(leaf, patterns):
                raise TokenizerRefused(
                    f"its {name} has the step {_text(leaf)[:200]}, which is not the base's, and "
                    "for which no limit of time and memory is known"
                )


def ids_in(steps: Mapping[str, Step | None]) -> Iterator[int]:
    """List the token ids that post-processors add."""
    for leaf in _leaves(steps["post_processor"]):
        special: dict[str, dict[str, list[int]]] = leaf.get("special_tokens") or {}
        for token in special.values():
            yield from token["ids"]
        yield from (leaf[name][1] for name in ("sep", "cls") if name in leaf)


def _is_bounded(leaf: Step, patterns: set[str]) -> bool:
    kind = leaf["type"]
    if kind in _BOUNDED:
        return True
    if kind == "Split":
        return bool(leaf["pattern"].get("String")) or _text(leaf["pattern"]) in patterns
    if kind == "Replace":
        found = leaf["pattern"].get("String")
        return bool(found) and len(leaf["content"]) <= len(found)
    if kind == "Prepend":
        return len(leaf["prepend"]) <= 1
    if kind == "TemplateProcessing":
        added = sum(len(token["ids"]) for token in leaf["special_tokens"].values())
        pieces = len(leaf["single"]) + len(leaf["pair"])
        return max(added, pieces) <= MAX_TEMPLATE_TOKENS
    return False


def _all_leaves(file: TokenizerFile) -> Iterator[Step]:
    for step in file.steps.values():
        yield from _leaves(step)


def _leaves(step: Step | None) -> Iterator[Step]:
    if step is None:
        return
    if step["type"] != "Sequence":
        yield step
        return
    for name in _PARTS:
        for part in step.get(name) or ():
            yield from _leaves(part)


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)
