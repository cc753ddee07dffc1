"""`jemkit show`: a local page on which one looks at a trained model."""

import errno
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

from jemkit_cli import process
from jemkit_cli.progress import tracking
from jemkit_cli.terminal import NoPlugins, guarded, installed_parts, say


@guarded
def show(
    run: Annotated[
        Path,
        typer.Argument(help="A run, a checkpoint folder or an exported model.", metavar="[RUN]"),
    ] = Path("runs/latest"),
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0: any that is free.")
    ] = 7860,
    browser: Annotated[
        bool, typer.Option("--browser/--no-browser", help="Open the page in a browser.")
    ] = True,
    max_images: Annotated[
        int, typer.Option(min=0, help="Number of test images in the histogram of energies.")
    ] = 1000,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Folder of the data set's files.", show_default=False),
    ] = None,
    download: Annotated[
        bool, typer.Option("--download", help="Download the data set if it is missing.")
    ] = False,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="Device to run on.")
    ] = "auto",
    checkpoint: Annotated[
        Literal["best", "last"], typer.Option(help="Checkpoint of a run.")
    ] = "best",
    no_plugins: NoPlugins = False,
) -> None:  # fmt: skip
    """Show a model on a local page: class, energy, attack, purification and generation."""
    _check_gradio()
    given = {"dir": data_dir and str(data_dir), "download": download or None}
    dataset = {k: v for k, v in given.items() if v is not None} or None
    with bound(port) as listening:
        registry = installed_parts(third_party=not no_plugins)
        from jemkit.runtime.precision import device_of, judging
        from jemkit_cli.show.looking import reference_energies
        from jemkit_cli.show.model import shown_model

        model = shown_model(run, registry, device_of(device), which=checkpoint, dataset=dataset)
        with judging(model.device, threads=model.threads):
            with tracking(silent=False) as progress:
                reference = reference_energies(model, max_images, progress)
            _serve(model, reference, listening, browser=browser)


def _check_gradio() -> None:
    """Before any slow work: the package that makes the page is there."""
    spec = find_spec("gradio")
    if spec is None or spec.origin is None:  # a folder of this name has no origin
        _without_gradio("it is not installed")


def _without_gradio(reason: str) -> NoReturn:
    from jemkit.errors import ConfigError
    from jemkit.runtime.extras import install

    raise ConfigError(
        f"jemkit show needs the package gradio ({reason}): {install('show')}"
    ) from None


def bound(port: int) -> socket.socket:
    """A socket that listens on 127.0.0.1; UsageError if the port is not free."""
    from jemkit.errors import UsageError

    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(("127.0.0.1", port))
        listening.listen(128)
    except OSError as error:
        listening.close()
        reason = "is in use" if error.errno == errno.EADDRINUSE else f"is refused: {error.strerror}"
        raise UsageError(
            f"port {port} on 127.0.0.1 {reason}; choose another one with --port, or --port 0 for "
            "any that is free"
        ) from None
    return listening


def _serve(model: Any, reference: Any, listening: socket.socket, *, browser: bool) -> None:
    with tempfile.TemporaryDirectory(prefix="jemkit-show-") as folder, _private(folder):
        try:
            from jemkit_cli.show.page import Page
            from jemkit_cli.show.server import serve
        except ImportError as error:
            _without_gradio(str(error))
        blocks = Page(model, reference).blocks
        process.PULSE.stop()  # from here on the command waits for the browser
        serve(blocks, listening, ready=_say_url, browser=browser, ended=model.end)


def _say_url(url: str) -> None:
    say(f"the page is at {url}; ^C ends it")


@contextmanager
def _private(folder: str) -> Iterator[None]:
    """Settings that gradio and what it uses read from the environment: no telemetry, no hub."""
    own = {
        "GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder, "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
