"""The web server of `jemkit show`: on 127.0.0.1 alone, with nothing loaded from elsewhere."""

import signal
import socket
import threading
import webbrowser
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import fastapi
import gradio as gr
import uvicorn

from jemkit_cli.show.drawing import STYLE
from jemkit_cli.show.loopback import Loopback
from jemkit_cli.show.received import LARGEST

FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
"""Of the browser's machine; the default fonts come from another host."""


def serve(
    blocks: Any, listening: socket.socket, *, ready: Callable[[str], None], browser: bool,
    ended: Callable[[], None],
) -> None:  # fmt: skip
    """Serve a page until SIGINT, SIGTERM or SIGHUP; `ready` gets its address."""
    port = int(listening.getsockname()[1])
    app = gr.mount_gradio_app(
        fastapi.FastAPI(openapi_url=None), blocks, "/", server_name="127.0.0.1", server_port=port,
        footer_links=[], run_history=False, show_error=False, max_file_size=LARGEST,
        ssr_mode=False, enable_monitoring=False, pwa=False, mcp_server=False,
        css=STYLE, theme=gr.themes.Default(**FONTS),
    )  # fmt: skip
    config = uvicorn.Config(
        Loopback(app, port), log_level="warning", access_log=False, timeout_graceful_shutdown=1
    )
    url = f"http://127.0.0.1:{port}"

    def started() -> None:
        ready(url)
        if browser:  # a browser in the terminal would block
            threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()

    _Server(config, started, ended).run(sockets=[listening])


class _Server(uvicorn.Server):  # type: ignore[misc]
    """Says when it is ready, and ends without repeating the signal that ended it."""

    def __init__(self, config: Any, started: Callable[[], None], ended: Callable[[], None]) -> None:
        super().__init__(config)
        self._started, self._ended = started, ended

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started:
            self._started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._ended()
        await super().shutdown(sockets=sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # one that is ignored stays so
        heeded = [n for n in numbers if signal.getsignal(n) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self.handle_exit) for number in heeded}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
