"""Write the bodies of /v1/models: base models and, below them, adapters."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from adapter_store.verdict import Verdict

OWNER = "reef"


def base_card(model_id: str, created: int, max_model_len: int | None) -> dict[str, Any]:
    """Describe a base model. `max_model_len` is null until the engine has loaded it."""
    card = _card(model_id, created, root=model_id, parent=None)
    return {**card, "max_model_len": max_model_len}


def adapter_card(
    model_id: str, parent: str, digest: str, created: int, verdict: Verdict | None
) -> dict[str, Any]:
    """Describe an adapter. Its `root` is the digest of its content."""
    card = _card(model_id, created, root=digest, parent=parent)
    return {**card, "proof": _proof(verdict)}


def _proof(verdict: Verdict | None) -> dict[str, Any]:
    """Say whether an engine has seen the adapter act, and what it saw."""
    if verdict is None:
        return {"status": "not_yet"}
    data = verdict.to_data()
    status, at = data.pop("outcome"), int(data.pop("proven_s"))
    return {"status": status, "at": at, **data}


def model_list(cards: list[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    """Make a page of the list, with the fields that OpenAI's pages have."""
    ends = {"first_id": cards[0]["id"], "last_id": cards[-1]["id"]} if cards else {}
    return {"object": "list", "data": cards, "has_more": has_more, **ends}


def anthropic_card(card: Mapping[str, Any]) -> dict[str, Any]:
    """Describe a model as Anthropic's API does."""
    created = datetime.fromtimestamp(card["created"], UTC)
    limit = card.get("max_model_len")
    return {
        "type": "model",
        "id": card["id"],
        "display_name": card["id"],
        "created_at": created.isoformat().replace("+00:00", "Z"),
        "lifecycle": "active",
        "max_input_tokens": limit,
        "max_tokens": limit,
    }


def anthropic_list(page: Mapping[str, Any]) -> dict[str, Any]:
    """Make the same page of the list as Anthropic's API does."""
    cards: Sequence[Mapping[str, Any]] = page["data"]
    ends = {name: page.get(name) for name in ("first_id", "last_id")}
    return {"data": list(map(anthropic_card, cards)), "has_more": page["has_more"], **ends}


def _card(model_id: str, created: int, root: str, parent: str | None) -> dict[str, Any]:
    fields = {"id": model_id, "object": "model", "created": created, "owned_by": OWNER}
    return {**fields, "root": root, "parent": parent}
