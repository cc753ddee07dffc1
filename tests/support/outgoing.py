"""Names every connection to another host that a process tries to make, on standard error."""

import os
import sys
from typing import Any

LOCAL = ("127.0.0.1", "localhost", "::1", "", None)


def audited() -> None:
    """From now on; for the life of the process."""
    sys.addaudithook(_audit)


def _audit(event: str, given: tuple[Any, ...]) -> None:
    host: Any = None
    if event == "socket.connect" and isinstance(given[1], tuple):
        host = given[1][0]
    elif event == "socket.getaddrinfo":
        host = given[0].decode() if isinstance(given[0], bytes) else given[0]
    if host not in LOCAL:
        os.write(2, f"outgoing: {event} {host}\n".encode())
