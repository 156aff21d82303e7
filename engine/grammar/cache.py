"""GrammarCache: which grammars are compiled, for how many requests; a bounded number of others."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from engine.grammar.compiler import GrammarCompiler
from engine.grammar.limits import MAX_IDLE_BYTES, MAX_IDLE_GRAMMARS
from engine.grammar.link import GrammarLink
from engine.grammar.messages import Verdict


@dataclass(slots=True, eq=False)
class Entry:
    """A grammar: being compiled without a verdict, ready with a link, or else refused."""

    grammar: str
    grammar_id: int
    tenant: str
    num_requests: int = 0
    verdict: Verdict | None = None
    link: GrammarLink | None = None

    @property
    def num_bytes(self) -> int:
        compiled = 0 if self.verdict is None else self.verdict.num_bytes
        return len(self.grammar) + compiled


class GrammarCache:
    """Belongs to the step loop. `wake` is called in another thread when there is news."""

    def __init__(self, start: Callable[[], GrammarLink], wake: Callable[[], None]) -> None:
        self.compiler = GrammarCompiler(start, wake)
        self._entries: OrderedDict[str, Entry] = OrderedDict()  # those used last at the end
        self._by_id: dict[int, Entry] = {}
        self._refused_again: list[Entry] = []
        self._num_ids = 0

    def want(self, tenant: str, grammar: str, num_requests: int) -> bool:
        """Count requests that use a grammar; False if they must wait for a `poll` that has it."""
        entry = self._entries.get(grammar) or self._add(tenant, grammar)
        entry.num_requests += num_requests
        self._entries.move_to_end(grammar)
        if entry.link is None and entry.verdict is not None:
            self._refused_again.append(entry)
        return entry.link is not None

    def release(self, grammar: str) -> None:
        """Count one request less. Every wanted one must be released, also of a refused grammar."""
        entry = self._entries[grammar]
        entry.num_requests -= 1
        if entry.num_requests == 0:
            if entry.verdict is None and self.compiler.cancel(entry.tenant, entry.grammar_id):
                self._forget(entry)
            self._trim()

    @property
    def has_news(self) -> bool:
        return self.compiler.has_news or bool(self._refused_again)

    def poll(self) -> list[Entry]:
        """Return what has become ready or was refused since the last call."""
        news, self._refused_again = self._refused_again, []
        for grammar_id, verdict, link in self.compiler.poll():
            entry = self._by_id.get(grammar_id)
            if entry is not None:
                entry.verdict, entry.link = verdict, link
                news.append(entry)
        return news

    def find(self, grammar: str) -> Entry:
        """Look up a grammar that a request uses."""
        return self._entries[grammar]

    def forget_link(self, link: GrammarLink) -> None:
        """Compile again what requests wait for, now that a process is lost."""
        self.compiler.lose(link)
        for entry in [e for e in self._entries.values() if e.link is link]:
            entry.link = entry.verdict = None
            if entry.num_requests:
                self.compiler.submit(entry.tenant, entry.grammar_id, entry.grammar)
            else:
                self._forget(entry)

    def _add(self, tenant: str, grammar: str) -> Entry:
        self._num_ids += 1
        entry = self._entries[grammar] = Entry(grammar, self._num_ids, tenant)
        self._by_id[entry.grammar_id] = entry
        self.compiler.submit(tenant, entry.grammar_id, grammar)
        return entry

    def _trim(self) -> None:
        """Keep as many grammars without a request as the limits allow, those used last."""
        idle = [e for e in self._entries.values() if not e.num_requests and e.verdict is not None]
        num_bytes = sum(entry.num_bytes for entry in idle)
        for entry in [e for e in idle if e.verdict is None or not e.verdict.is_lasting]:
            num_bytes -= entry.num_bytes
            idle.remove(entry)
            self._forget(entry)
        while len(idle) > MAX_IDLE_GRAMMARS or num_bytes > MAX_IDLE_BYTES:
            entry = idle.pop(0)
            num_bytes -= entry.num_bytes
            self._forget(entry)

    def _forget(self, entry: Entry) -> None:
        del self._entries[entry.grammar], self._by_id[entry.grammar_id]
        if entry.link is not None:
            self.compiler.drop(entry.grammar_id)
