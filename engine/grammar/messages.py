"""Messages between the engine and the processes of its grammars. Plain data, no tensors.

Three sockets: `control` and `checks` serve one call after the other, `masks` the step loop.
"""

from engine.framing import Message

# (slot, grammar_id, token_ids, drafts, max_forced): the slot's matcher goes on with these tokens;
# with a grammar_id above 0 it is a new one, and the tokens are the whole output so far. Drafts may
# follow; without any, at most `max_forced` tokens are of use that are certain to follow
MatcherStep = tuple[int, int, list[int], list[int], int]


# ==== control ====


class StartGrammars(Message):
    tokenizer_path: str
    vocab_size: int
    eos_token_ids: tuple[int, ...]


class TableReady(Message):
    """The tokenizer's table is there: grammars can be compiled."""


class TableFailed(Message):
    reason: str


class KeepGrammar(Message):
    """Compile the grammar, for matchers that begin with it."""

    grammar_id: int
    grammar: str


class GrammarKept(Message):
    error: str | None = None


class DropGrammar(Message):
    """Forget the grammar. Its matchers go on."""

    grammar_id: int


ToControl = StartGrammars | KeepGrammar | DropGrammar
FromControl = TableReady | TableFailed | GrammarKept


# ==== checks ====


class CheckGrammar(Message):
    grammar: str


class Verdict(Message):
    """`error` is None for a grammar that can be used; `is_lasting`: it would be refused again."""

    error: str | None = None
    is_lasting: bool = True
    num_bytes: int = 0


# ==== masks ====


class WantMasks(Message):
    """Go on with matchers, and write each one's next mask to the memory of its slot, and those that
    follow its drafts as far as these may be right."""

    number: int
    steps: list[MatcherStep]
    ended_slots: list[int]


class MasksReady(Message):
    """The answer to the WantMasks of this number. A slot with an error has no mask.

    `num_masks` of slots with drafts: further drafts cannot be right. `forced` of some slots: the
    tokens that must follow, beginning with the only one that the mask allows.
    """

    number: int
    errors: dict[int, str]
    num_masks: dict[int, int]
    forced: dict[int, list[int]]
