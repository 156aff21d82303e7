"""Render and probe chat templates that come with adapters, a line of JSON in and one out.

A template is a program, and who publishes adapters is not trusted to run one in the server: it has
the same sandbox as a model's own, in a process that ends at its limit of memory or of time.

    python -m deployments.text.render_process
"""

import json
import resource
import signal
import sys
from dataclasses import asdict
from functools import lru_cache
from typing import Any

from deployments.text.chat_template import ChatTemplate, TemplateRefused
from deployments.text.tools.probe import probe_tools

MEMORY_BYTES = 512 * 2**20
CPU_S = 2.0  # for one chat, with the compilation of its template
MAX_CHARS = 8 * 2**20  # of a rendered chat
KEPT_TEMPLATES = 32


def answer(line: bytes) -> dict[str, Any]:
    """Render one chat, or probe a template, which can make no error of this process."""
    try:
        chat: dict[str, Any] = json.loads(line)
        template = _compiled(chat["source"], json.dumps(chat["special_tokens"], sort_keys=True))
        if chat.get("is_probe"):
            return _probed(template)
        text = template.render(chat["messages"], chat["add_generation_prompt"], chat["extra"])
    except TemplateRefused as error:
        return {"refused": str(error)}
    except Exception as error:  # it cannot be compiled
        return {"refused": f"The chat template cannot be used: {str(error)[:300]}"}
    if len(text) > MAX_CHARS:
        return {"refused": f"The chat template wrote more than {MAX_CHARS} characters."}
    return {"text": text}


def _probed(template: ChatTemplate) -> dict[str, Any]:
    """Tell how the template calls tools, for `BoundedRenderer.probe`."""
    found = probe_tools(template.render)
    return {
        "form": None if found.form is None else found.form.name,
        "style": asdict(found.style),
        "has_one_call": found.has_one_call,
        "refusal": found.refusal,
        "variables": sorted(template.variables()),
    }


@lru_cache(KEPT_TEMPLATES)
def _compiled(source: str, special_tokens: str) -> ChatTemplate:
    return ChatTemplate(source, json.loads(special_tokens))


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the end of the input ends this process
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, CPU_S)  # then SIGPROF, which ends the process
        text = json.dumps(answer(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
