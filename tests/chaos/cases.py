"""Makes hostile HTTP requests: valid ones, changed a few times.

Case n of a seed is always the same. Three kinds of changes follow each other: of the document, of
its bytes, of the HTTP around it.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from random import Random

from tests.chaos.case import JSON, Case, Header, complete
from tests.chaos.document_changes import BYTES, DOCUMENTS
from tests.chaos.documents import as_json, valid
from tests.chaos.http_changes import HTTP
from tests.chaos.surface_documents import surface_document

STRANGERS = ("", "nobody", "tiny@1", "red@99", "red@", "@", "tiny:", ":red", "other:red", "a b")
SHARE_OF_SURFACES = 0.4  # other than chats and completions
SHARE_OF_BYTES = 0.1
SHARE_OF_HTTP = 0.2


@dataclass(frozen=True, slots=True)
class Grammar:
    """What the cases are made of: names of models that exist, and keys, if the server wants any."""

    models: Sequence[str]
    keys: Sequence[str] = ()

    def case(self, seed: int, number: int) -> Case:
        rng = Random(f"{seed}/{number}")
        models = [*self.models] * 4 + [*STRANGERS]
        if rng.random() < SHARE_OF_SURFACES:
            path, document = surface_document(rng, rng.choice(models))
        else:
            path, document = valid(rng, models)
        document = deepcopy(document)  # parts of it are those of other bodies, too
        changes: list[str] = []
        for _ in range(rng.choice((0, 0, 0, 1, 1, 2))):
            name, change = rng.choice(DOCUMENTS)
            change(rng, document)
            changes.append(name)
        body = as_json(rng, document)
        if rng.random() < SHARE_OF_BYTES:
            name, damage = rng.choice(BYTES)
            body = damage(rng, body)
            changes.append(name)
        case = Case(number, "POST", path.encode(), (JSON,), body)
        if rng.random() < SHARE_OF_HTTP:
            name, alter = rng.choice(HTTP)
            case = alter(rng, case)
            changes.append(name)
        return complete(replace(case, changes=tuple(changes)), self._credentials(rng))

    def _credentials(self, rng: Random) -> list[Header]:
        if not self.keys or rng.random() < 0.05:
            return []
        wrong = rng.choice((b"Bearer x", b"Basic eDp5", b"\xff\xfe", b"Bearer " + b"a" * 3000))
        key = b"Bearer " + rng.choice(self.keys).encode()
        return [(b"Authorization", wrong if rng.random() < 0.1 else key)]
