"""Sessions: clients' names for requests that belong together, which go to one replica if they can.

OpenAI's `prompt_cache_key` in the body, or the header x-session-id. The proxy in front hands that
on under a name of ours, since Ray would obey its own.
"""

from collections.abc import Mapping
from dataclasses import replace

from deployments.ingress.generation import Plan

HEADERS = ("x-reef-session-id", "x-session-id")
MAX_CHARS = 256  # of a name; the rest is not looked at


def session_key(name: object) -> str:
    return name[:MAX_CHARS] if isinstance(name, str) else ""


def session_of(headers: Mapping[str, str]) -> str:
    """Return the session that a request's headers name; empty if they name none."""
    return session_key(next((headers[name] for name in HEADERS if name in headers), ""))


def in_session(plan: Plan, session: str) -> Plan:
    """Return the plan with its requests in the session, unless their bodies name one."""
    if not session:
        return plan
    submits = [each if each.session else replace(each, session=session) for each in plan.submits]
    return replace(plan, submits=submits)


def caller_of(session: str, request_id: str, *users: object) -> str:
    """Name whose requests one version of an alias is to answer.

    A session of the headers, else the first user that the body names, else this request alone.
    """
    if session:
        return f"session {session}"
    user = next((session_key(user) for user in users if isinstance(user, str) and user), "")
    return f"user {user}" if user else f"request {request_id}"
