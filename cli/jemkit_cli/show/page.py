"""The page itself, of gradio's components; what they show is computed elsewhere."""

import functools
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import gradio as gr
from torch import Tensor

from jemkit.errors import JemkitError
from jemkit.runtime.html import text
from jemkit_cli.show import chains, drawing, looking, received
from jemkit_cli.show.chains import State
from jemkit_cli.show.looking import Image, Reference
from jemkit_cli.show.model import ShownModel

ANY = "any class"
UPDATES = 40  # of the page during one computation
MOST_IMAGES, WIDEST_PX = 16, 64.0
HIDDEN: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
CANVAS = """
canvas { width: 240px; height: 240px; touch-action: none; image-rendering: pixelated;
  display: block; border: 1px solid #888; margin-bottom: 6px }
button { border: 1px solid #888; border-radius: 4px; padding: 4px 12px }
"""


def reported(handler: Callable[..., Any]) -> Callable[..., Any]:
    """A handler of an event; errors that a user can cause are shown in the page."""

    @functools.wraps(handler)
    def run(*inputs: Any) -> Any:
        try:
            return handler(*inputs)
        except JemkitError as error:
            raise gr.Error(text(error), duration=None, print_exception=False) from None

    return run


def reported_steps(handler: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """The same of a handler that yields."""

    @functools.wraps(handler)
    def run(*inputs: Any) -> Iterator[Any]:
        try:
            yield from handler(*inputs)
        except JemkitError as error:
            raise gr.Error(text(error), duration=None, print_exception=False) from None

    return run


class Page:
    """The components of the page, and what happens on each event."""

    def __init__(self, shown: ShownModel, reference: Reference | None) -> None:
        self.shown, self.reference = shown, reference
        self.choices: list[Any] = []  # events after which another image is chosen
        first = looking.image_at(shown, 0)
        with gr.Blocks(title="jemkit show", analytics_enabled=False) as self.blocks:
            gr.HTML(drawing.header(shown))
            self.image = gr.State(first)
            with gr.Row():
                with gr.Column(min_width=300):
                    self._choice()
                with gr.Column(min_width=300):
                    self.result = gr.HTML(self._look(first)[0], elem_id="result")
            self.seed = gr.Number(
                0, label="Seed of random starts and noise", precision=0, minimum=0,
                maximum=2**32 - 1, render=False,
            )  # fmt: skip
            with gr.Tab("Attack"):
                self._attack_tab()
            with gr.Tab("Purify"):
                self._purify_tab()
            with gr.Tab("Generate"):
                self._generate_tab()
            self.seed.render()
            stale = [self.attacked_html, self.attacked, self.purified_html, self.purified]
            for event in self.choices:
                event.success(self._look, self.image, [self.result, *stale], **HIDDEN)

    def _choice(self) -> None:
        """Where an image comes from."""
        with gr.Tab("Test images"):
            self._test_images()
        with gr.Tab("Open a file"):
            file = gr.File(label="An image file of at most 8 MiB", file_types=["image"])
            self._choose(file.upload, self._open, file)
        with gr.Tab("Draw"):
            channels, height, width = self.shown.shape
            colour = '<input type="color" value="#ffffff" aria-label="colour"> '
            canvas = gr.HTML(
                "", elem_id="canvas", css_template=CANVAS,
                html_template=f'<canvas width="{width}" height="{height}"></canvas><div>'
                f"{colour if channels == 3 else ''}<button>Clear</button></div>",
                js_on_load=files(__package__).joinpath("canvas.js").read_text(encoding="utf-8"),
            )  # fmt: skip
            self._choose(canvas.change, self._draw, canvas)

    def _test_images(self) -> None:
        if self.shown.test is None:
            gr.HTML(drawing.notice(f"There are no test images: {self.shown.untested}"))
            return
        n = len(self.shown.test.y)
        index = gr.Slider(0, n - 1, 0, step=1, label="Test image", elem_id="index")
        with gr.Row():
            kind = gr.Dropdown([ANY, *self.shown.classes], value=ANY, label="Class", min_width=150)
            following = gr.Button("Next image", min_width=120, elem_id="next")
        self._choose(index.change, self._test_image, index)
        following.click(reported(self._next), [index, kind], index, **HIDDEN)

    def _choose(self, event: Callable[..., Any], handler: Callable[..., Any], given: Any) -> None:
        self.choices.append(event(reported(handler), given, self.image, **HIDDEN))

    def _test_image(self, index: float) -> Image | None:
        return looking.image_at(self.shown, int(index))

    def _next(self, index: float, kind: str) -> int:
        return looking.next_of_class(self.shown, int(index), self._label(kind))

    def _open(self, path: str) -> Image:
        return Image(received.file_image(Path(path), self.shown.shape), None, "your image")

    def _draw(self, drawn: str) -> Image:
        return Image(received.drawn_image(drawn, self.shown.shape), None, "your drawing")

    def _label(self, kind: str) -> int | None:
        return None if kind == ANY else self.shown.classes.index(kind)

    def _look(self, image: Image | None) -> tuple[str, str, None, str, None]:
        """The chosen image; what was made of the one before is removed."""
        if image is None:
            return drawing.notice("Open an image file, or draw an image."), "", None, "", None
        view = looking.views(self.shown, image.x)[0]
        return drawing.looked_at(self.shown, image, view, self.reference), "", None, "", None

    def _attack_tab(self) -> None:
        usual = self.shown.radius_px
        with gr.Row():
            radius = gr.Slider(
                0, max(WIDEST_PX, usual), usual, step=0.5, label="Radius in 1/255, L-infinity",
                min_width=240,
            )  # fmt: skip
            steps = gr.Slider(1, 200, 20, step=1, label="Steps of PGD", min_width=240)
        button = gr.Button("Attack", variant="primary", elem_id="attack")
        self.attacked_html = gr.HTML(elem_id="attacked")
        self.attacked = gr.State(None)
        use = gr.Button("Continue with the attacked image", elem_id="use-attacked")
        inputs = [self.image, radius, steps, self.seed]
        button.click(
            reported_steps(self._attack), inputs, [self.attacked_html, self.attacked], **HIDDEN
        )
        self._choose(use.click, self._use_attacked, [self.image, self.attacked])

    def _attack(
        self, image: Image | None, radius_px: float, steps: float, seed: float
    ) -> Iterator[tuple[str, Tensor | None]]:
        image = _required(image)
        label = image.label
        if label is None:
            label = looking.views(self.shown, image.x)[0].label
        states = chains.attack(
            self.shown, image.x, label, radius_px=radius_px, steps=int(steps), seed=int(seed)
        )
        yield from self._followed(states, int(steps), label)

    def _purify_tab(self) -> None:
        if self.shown.unsampled:
            gr.HTML(drawing.notice(self.shown.unsampled))
        else:
            gr.HTML(drawing.sampler(self.shown))
        possible = not self.shown.unsampled
        steps = gr.Slider(1, 500, 20, step=1, label="Steps of the chain", visible=possible)
        button = gr.Button("Purify", variant="primary", elem_id="purify", interactive=possible)
        self.purified_html = gr.HTML(elem_id="purified")
        self.purified = gr.State(None)
        use = gr.Button(
            "Continue with the purified image", elem_id="use-purified", visible=possible
        )
        inputs = [self.image, steps, self.seed]
        button.click(
            reported_steps(self._purify), inputs, [self.purified_html, self.purified], **HIDDEN
        )
        self._choose(use.click, self._use_purified, [self.image, self.purified])

    def _purify(
        self, image: Image | None, steps: float, seed: float
    ) -> Iterator[tuple[str, Tensor | None]]:
        image = _required(image)
        states = chains.purify(self.shown, image.x, steps=int(steps), seed=int(seed))
        yield from self._followed(states, int(steps), image.label)

    def _followed(
        self, states: Iterator[State], steps: int, label: int | None
    ) -> Iterator[tuple[str, Tensor | None]]:
        """The page after some of the states, and the last image."""
        course: list[State] = []
        for state in states:
            course.append(state)
            if state.step % max(1, steps // UPDATES) == 0 or state.step == steps:
                html = drawing.before_and_after(
                    self.shown, course, label, self.reference, steps=steps
                )
                yield html, state.x if state.step == steps else None

    def _use_attacked(self, image: Image | None, x: Tensor | None) -> Image:
        return _continued(image, x, "attacked")

    def _use_purified(self, image: Image | None, x: Tensor | None) -> Image:
        return _continued(image, x, "purified")

    def _generate_tab(self) -> None:
        possible = not self.shown.unsampled
        if not possible:
            gr.HTML(drawing.notice(self.shown.unsampled))
        with gr.Row(visible=possible):
            kind = gr.Dropdown([ANY, *self.shown.classes], value=ANY, label="Class", min_width=150)
            n = gr.Slider(1, MOST_IMAGES, 8, step=1, label="Images", min_width=150)
            steps = gr.Slider(1, 500, 40, step=1, label="Steps of each chain", min_width=240)
        button = gr.Button("Generate", variant="primary", elem_id="generate", interactive=possible)
        result, images = gr.HTML(elem_id="generated", min_height=60), gr.State(None)
        with gr.Row(visible=possible):
            which = gr.Number(1, label="Image", precision=0, minimum=1, maximum=MOST_IMAGES,
                              min_width=120)  # fmt: skip
            use = gr.Button("Continue with this image", min_width=180, elem_id="use-generated")
        button.click(
            reported(self._generate), [kind, n, steps, self.seed], [result, images],
            show_progress_on=result, api_visibility="private",
        )  # fmt: skip
        self._choose(use.click, self._use_generated, [images, which])

    def _generate(
        self, kind: str, n: float, steps: float, seed: float,
        progress: Any = gr.Progress(),  # noqa: B008  gradio finds it as a default
    ) -> tuple[str, Tensor]:  # fmt: skip
        x = chains.generate(
            self.shown, self._label(kind), int(n), steps=int(steps), seed=int(seed),
            progress=lambda passes: progress((min(passes, int(steps)), int(steps)), unit="steps"),
        )  # fmt: skip
        return drawing.generated(self.shown, x, looking.views(self.shown, x), self.reference), x

    def _use_generated(self, images: Tensor | None, which: float) -> Image:
        if images is None or not 1 <= which <= len(images):
            raise JemkitError("There is no such generated image: generate images first.")
        row = int(which) - 1
        return Image(images[row : row + 1], None, f"generated image {int(which)}")


def _required(image: Image | None) -> Image:
    if image is None:
        raise JemkitError("There is no image yet: open an image file, or draw an image.")
    return image


def _continued(image: Image | None, x: Tensor | None, verb: str) -> Image:
    if image is None or x is None:
        raise JemkitError(f"There is no {verb} image yet.")
    return Image(x, image.label, f"{image.source}, {verb}")
