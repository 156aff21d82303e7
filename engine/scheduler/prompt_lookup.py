"""PromptLookup: guesses a text's next tokens from where its last ones stood before.

An answer that copies from its prompt, or repeats itself, goes on as it did there (prompt lookup
decoding; Saxena 2023). The places of each pair of tokens are chained from the newest to the oldest,
as compressors of the LZ77 kind do: adding a token takes constant time, and a look-up a bounded one.
"""

from array import array
from collections.abc import Iterable

MAX_MATCH = 32  # tokens before a place that are compared
MAX_PLACES = 8  # places that are compared, newest first


class PromptLookup:
    """The tokens of one request: some 150 bytes a token, of which most are the table of pairs."""

    def __init__(self) -> None:
        self._tokens = array("i")
        self._newest: dict[int, int] = {}  # where the pair that ends here was seen last
        self._older = array("i")  # by place: the one before of the same pair, or -1

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, token_ids: Iterable[int]) -> None:
        tokens, newest, older = self._tokens, self._newest, self._older
        place, last = len(tokens), tokens[-1] if tokens else 0
        for token_id in token_ids:
            pair = last << 32 | token_id
            older.append(newest.get(pair, -1) if place else -1)
            if place:
                newest[pair] = place
            tokens.append(token_id)
            place, last = place + 1, token_id

    def find(self, most: int) -> tuple[list[int], int]:
        """Return at most `most` tokens that may come next, and how many tokens before them are
        equal at the place where they were found: ([], 0) if the last two never stood together
        before."""
        place, length = self._longest_match()
        if not length or most <= 0:
            return [], 0
        found = self._tokens[place + 1 : place + 1 + most].tolist()
        period = len(found)
        while len(found) < most:  # the place is so near that what follows it is not known yet
            found.append(found[len(found) - period])
        return found, length

    def _longest_match(self) -> tuple[int, int]:
        """Find the place whose tokens before it are equal for longest; the newest of equals."""
        if not self._tokens:
            return -1, 0
        best, longest = -1, 0
        end = len(self._tokens) - 1
        place = self._older[end]
        for _ in range(MAX_PLACES):
            if place < 0:
                break
            length = self._match(place, end)
            if length > longest:
                best, longest = place, length
                if length >= MAX_MATCH:
                    break
            place = self._older[place]
        return best, longest

    def _match(self, place: int, end: int) -> int:
        tokens, length = self._tokens, 2  # both end with one pair
        most = min(MAX_MATCH, place + 1)
        while length < most and tokens[place - length] == tokens[end - length]:
            length += 1
        return length
