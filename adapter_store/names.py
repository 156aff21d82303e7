"""Define how tenants, adapters, versions and aliases are spelled, and what a name resolves to.

Parameters of this package say which handle of an adapter they take: `name` is its bare name,
`full_name` is name[@version|alias], `ref` an AdapterRef, `digest` the 64 hexadecimal digits of its
content and base, `folder` its files. A bare `adapter` would be none of these, and is not used.
"""

import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

from adapter_store.errors import InvalidName
from adapter_store.recipes import Recipe
from adapter_store.verdict import Verdict

LATEST = "latest"
NAME_RULE = "[A-Za-z0-9][A-Za-z0-9._-]{0,95}"  # a regular expression, for other grammars to reuse
_NAME = re.compile(NAME_RULE)
_VERSION = re.compile("[1-9][0-9]{0,17}")


# A retired version may be restored while its files are there; a deleted one may not.
State = Literal["live", "retired", "deleted"]


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """A resolved name. Only `digest` identifies the content; the rest says how it was found.

    With a `recipe` it is combined from other adapters, and is nowhere but on local disk.
    """

    tenant: str
    name: str
    version: int
    digest: str
    base: str  # fingerprint
    recipe: Recipe | None = None
    vocab_size: int = 0  # rows of its own embedding, more or fewer than the base's; 0: as there
    lora_rank: int = 0  # the largest of its modules; of a combined one, all of them together


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """One version, as listings show it."""

    tenant: str
    name: str
    version: int
    digest: str
    base: str
    lora_rank: int
    nbytes: int  # of its files together
    published_s: float  # seconds since 1970
    aliases: tuple[str, ...]  # `latest` among them
    generation: int = 0  # of its files
    verdict: Verdict | None = None  # of the latest probe; None: no engine has proven it yet
    state: State = "live"
    published_by: str = ""  # who; empty if the record does not say


class Place(NamedTuple):
    """Where the files of one upload lie. What is uploaded after a collection has a new place."""

    digest: str
    generation: int  # collections before the upload


def check_name(kind: str, name: str) -> str:
    """Return the name; InvalidName, which mentions its kind, if it breaks NAME_RULE."""
    if _NAME.fullmatch(name) is None:
        raise InvalidName(f"{kind} {name!r} does not match {NAME_RULE}")
    return name


def check_alias(alias: str) -> str:
    """Return the alias; InvalidName if it could be taken for a version or for `latest`."""
    if alias == LATEST or alias.isdecimal():
        raise InvalidName(
            f"alias {alias!r} is reserved: numbers are versions, {LATEST} is implicit"
        )
    return check_name("alias", alias)


def split_name(full_name: str) -> tuple[str, int | str]:
    """Split `sql@3` into ("sql", 3), `sql@prod` into ("sql", "prod"), `sql` into ("sql", "latest").

    Raises InvalidName.
    """
    name, at, selector = full_name.partition("@")
    check_name("adapter", name)
    if not at:
        return name, LATEST
    if _VERSION.fullmatch(selector):
        return name, int(selector)
    if selector.isdecimal():
        raise InvalidName(f"version {selector!r} of {name} must be a number from 1")
    return name, check_name("version or alias", selector)
