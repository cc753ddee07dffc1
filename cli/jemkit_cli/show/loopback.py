"""Refuses requests to `jemkit show` that do not come from its own page."""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from jemkit.runtime.opening import MIB
from jemkit_cli.show.received import LARGEST

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'self'; frame-ancestors 'none'"
)
"""What a browser lets the page load: nothing from other hosts."""


class Loopback:
    """Refuses requests that are meant for other hosts, sent by other pages, or too large.

    A page of another host could otherwise reach this one, also by a name that it resolves to
    127.0.0.1.
    """

    def __init__(self, app: Any, port: int) -> None:
        self.app = app
        names = ("127.0.0.1", "localhost")
        self.hosts = {f"{name}:{port}" for name in names} | ({*names} if port == 80 else set())
        self.origins = {f"http://{host}" for host in self.hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        status = self._refused(headers) if scope["type"] == "http" else 403
        if status:
            await send({"type": "http.response.start", "status": status, "headers": []})
            await send({"type": "http.response.body", "body": b"refused\n"})
            return

        async def with_policy(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                more = [(b"content-security-policy", POLICY.encode()),
                        (b"x-content-type-options", b"nosniff"),
                        (b"referrer-policy", b"no-referrer")]  # fmt: skip
                message["headers"] = [*message.get("headers", []), *more]
            await send(message)

        await self.app(scope, receive, with_policy)

    def _refused(self, headers: dict[str, str]) -> int:
        """The status of a refusal; 0 if the request is allowed."""
        if headers.get("host") not in self.hosts or (
            "origin" in headers and headers["origin"] not in self.origins
        ):
            return 403
        length = headers.get("content-length", "0")
        return 0 if length.isdecimal() and int(length) <= LARGEST + MIB else 413
