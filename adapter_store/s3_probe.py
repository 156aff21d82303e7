"""Tell whether a server keeps only one of two conditional writes that overlap in time.

A server may look for the key when a request begins and write when its last byte has come. Requests
one after the other do not show that, so here one is begun, another is made, and the first is ended.
"""

import ssl
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing
from http.client import HTTPConnection, HTTPSConnection
from urllib.parse import urlsplit

HEAD_START_S = 0.1  # for the first request to reach the server
OVERLAP_S = 1.0  # a server that makes the second wait for the first is not kept waiting longer
TIMEOUT_S = 20.0
_DATA = b"A probe: two of these were written at the same time, and one must be refused.\n"


def do_both_succeed(url: str, put_other: Callable[[bytes], bool]) -> bool:
    """Write one key twice at once, by a presigned URL and by `put_other`; say if both succeed.

    The URL is one for a PUT with If-None-Match: *. Raises OSError, HTTPException or what
    `put_other` raises.
    """
    half = len(_DATA) // 2
    # The connection is closed first: it may be what the other request waits for.
    with ThreadPoolExecutor(1) as pool, closing(_connect(url)) as connection:
        _begin(connection, url)
        connection.send(_DATA[:half])
        time.sleep(HEAD_START_S)
        other = pool.submit(put_other, _DATA)
        wait([other], OVERLAP_S)
        connection.send(_DATA[half:])
        is_written = 200 <= connection.getresponse().status < 300
        return other.result() and is_written


def _connect(url: str) -> HTTPConnection:
    parts = urlsplit(url)
    assert parts.hostname is not None, url
    if parts.scheme == "https":
        context = ssl.create_default_context()
        return HTTPSConnection(parts.hostname, parts.port, timeout=TIMEOUT_S, context=context)
    return HTTPConnection(parts.hostname, parts.port, timeout=TIMEOUT_S)


def _begin(connection: HTTPConnection, url: str) -> None:
    parts = urlsplit(url)
    connection.putrequest("PUT", f"{parts.path}?{parts.query}", skip_accept_encoding=True)
    connection.putheader("Content-Length", str(len(_DATA)))
    connection.putheader("If-None-Match", "*")
    connection.endheaders()
