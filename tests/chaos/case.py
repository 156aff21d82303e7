"""Case: one HTTP request as it is sent, byte by byte."""

from dataclasses import dataclass, replace

Header = tuple[bytes, bytes]
JSON: Header = (b"Content-Type", b"application/json")


@dataclass(frozen=True, slots=True)
class Case:
    """One request. `changes` says what was done to it.

    With `num_sent` the client leaves after so many bytes of the body, with `leaves_after` after so
    many events of the answer. `is_http` is false if what is sent is not quite HTTP, so that the
    answer may come from in front of the server, or not at all.
    """

    number: int
    method: str
    path: bytes
    headers: tuple[Header, ...]
    body: bytes
    changes: tuple[str, ...] = ()
    num_sent: int | None = None
    leaves_after: int | None = None
    is_http: bool = True

    @property
    def is_abandoned(self) -> bool:
        return self.num_sent is not None or self.leaves_after is not None

    def raw(self) -> bytes:
        head = b"%s %s HTTP/1.1\r\n" % (self.method.encode(), self.path)
        lines = b"".join(b"%s: %s\r\n" % header for header in self.headers)
        return head + lines + b"\r\n" + self.body[: self.num_sent]


def complete(case: Case, credentials: list[Header]) -> Case:
    """Add what every request has, unless a change has set it."""
    named = {name.lower() for name, _ in case.headers}
    headers = [*case.headers, *credentials]
    if b"host" not in named:
        headers.insert(0, (b"Host", b"127.0.0.1"))
    if b"content-length" not in named and b"transfer-encoding" not in named:
        headers.append((b"Content-Length", str(len(case.body)).encode()))
    if b"connection" not in named:
        headers.append((b"Connection", b"close"))
    return replace(case, headers=tuple(headers))
