"""Write the bodies of /v1/models: base models and, below them, adapters."""

from typing import Any

OWNER = "reef"


def base_card(model_id: str, created: int, max_model_len: int | None) -> dict[str, Any]:
    """Describe a base model. `max_model_len` is null until the engine has loaded it."""
    card = _card(model_id, created, root=model_id, parent=None)
    return {**card, "max_model_len": max_model_len}


def adapter_card(model_id: str, parent: str, digest: str, created: int) -> dict[str, Any]:
    """Describe an adapter. Its `root` is the digest of its content."""
    return _card(model_id, created, root=digest, parent=parent)


def model_list(cards: list[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    """Make a page of the list, with the fields that OpenAI's pages have."""
    ends = {"first_id": cards[0]["id"], "last_id": cards[-1]["id"]} if cards else {}
    return {"object": "list", "data": cards, "has_more": has_more, **ends}


def _card(model_id: str, created: int, root: str, parent: str | None) -> dict[str, Any]:
    fields = {"id": model_id, "object": "model", "created": created, "owned_by": OWNER}
    return {**fields, "root": root, "parent": parent}
