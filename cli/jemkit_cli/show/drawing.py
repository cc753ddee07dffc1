"""Results as markup: images, class probabilities, curves and histograms."""

import base64
import io
import math
from collections.abc import Sequence

import torch
from PIL import Image as Pillow
from torch import Tensor

from jemkit.metrics.charts import Axes, Panel, Series, key_of, lines, picture
from jemkit.metrics.figures import bin_edges, shares
from jemkit.metrics.plots import to_bytes
from jemkit.runtime.html import Html, join, tag, text
from jemkit_cli.show.chains import State
from jemkit_cli.show.looking import Image, Reference, View
from jemkit_cli.show.model import ShownModel

BINS, CLASSES = 40, 10
"""Bins of the histogram; classes that are listed at most."""

STYLE = """
.jk { color: var(--body-text-color); font-size: 14px; line-height: 1.5 }
.jk h2 { font-size: 18px; margin: 0 0 2px } .jk p { margin: 4px 0 } .jk .soft { opacity: .75 }
.jk .row { display: flex; flex-wrap: wrap; gap: 14px; align-items: flex-start }
.jk figure { margin: 0; max-width: 100% } .jk figcaption { font-size: 13px; max-width: 168px }
.jk figcaption span { display: block }
.jk img.pixels { width: 168px; max-width: 100%; image-rendering: pixelated; display: block;
  border: 1px solid var(--border-color-primary) }
.jk .strip img.pixels { width: 92px } .jk .strip figcaption { max-width: 104px }
.jk img.chart { width: 100%; max-width: 440px; height: auto; display: block; margin-top: 8px }
.jk .bars { flex: 1 1 210px; min-width: 0; max-width: 380px }
.jk .bar { display: flex; gap: 6px; align-items: center; font-size: 13px }
.jk .bar .name { width: 84px; overflow: hidden; text-overflow: ellipsis; white-space: nowrap }
.jk .bar .rail { flex: 1; height: 10px; background: var(--border-color-primary) }
.jk .bar .rail i { display: block; height: 10px; background: #0068a8 }
.jk .bar .value { width: 52px; text-align: right; font-variant-numeric: tabular-nums }
.jk .warn { border-left: 3px solid #c8500a; padding-left: 8px }
"""


def block(*parts: object) -> str:
    return tag("div", *parts, class_="jk")


def header(shown: ShownModel) -> str:
    """What is shown, in a title and a line."""
    about = shown.about
    parts = [f"{name} {about[name]}" for name in
             ("backbone", "objective", "data", "checkpoint", "seed") if name in about]  # fmt: skip
    size = " x ".join(map(str, shown.shape))
    line = ", ".join([*parts, f"{len(shown.classes)} classes, images {size}"])
    return block(tag("h2", about.get("run", "model")), tag("p", line, class_="soft"))


def notice(message: str) -> str:
    return block(tag("p", message, class_="warn"))


def number(value: float) -> str:
    return f"{value:.4g}".replace("-", "−") if math.isfinite(value) else str(value)


def percent(value: float) -> str:
    return f"{value:.1%}" if math.isfinite(value) else str(value)


def looked_at(
    shown: ShownModel, image: Image, view: View, reference: Reference | None
) -> str:  # fmt: skip
    """An image with its class probabilities, its energy and the energy's place."""
    sentence = [f"E(x) = {number(view.energy)}"]
    if reference is not None:
        below = reference.below(view.energy)
        sentence.append(f", higher than that of {percent(below)} of {reference.text}")
    truth = "" if image.label is None else f", class {shown.classes[image.label]}"
    caption = f"{image.source}{truth}"
    return block(
        tag("div", pixels(image.x, caption), bars(shown, view), class_="row"),
        tag("p", *sentence),
        histogram(reference, [("E(x) of this image", view.energy)]),
    )


def pixels(x: Tensor, caption: str, *more: str) -> Html:
    """An image [1, C, H, W] in [0, 1], enlarged, with its caption."""
    array = to_bytes(x[0].cpu()).permute(1, 2, 0).numpy()
    image = Pillow.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    source = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    below = join(caption, *(tag("span", line) for line in more))
    return tag(
        "figure", Html(f'<img class="pixels" alt="{text(caption)}" src="{source}">'),
        tag("figcaption", below),
    )  # fmt: skip


def bars(shown: ShownModel, view: View) -> Html:
    """The probabilities of the most probable classes."""
    p = view.probabilities
    order = range(len(p)) if len(p) <= CLASSES else p.topk(CLASSES).indices.tolist()
    rows = [_bar(shown.classes[i], float(p[i])) for i in order]
    title = "p(y | x)" if len(p) <= CLASSES else f"p(y | x), the {CLASSES} highest of {len(p)}"
    return tag("div", tag("p", title, class_="soft"), *rows, class_="bars")


def _bar(name: str, p: float) -> Html:
    width = f"width: {100 * p:.1f}%" if math.isfinite(p) else "width: 0"
    return tag(
        "div", tag("span", name, class_="name", title=name),
        tag("span", tag("i", style=width), class_="rail"),
        tag("span", percent(p), class_="value"), class_="bar",
    )  # fmt: skip


def histogram(reference: Reference | None, marked: Sequence[tuple[str, float]]) -> Html:
    """The energies of test images, and where those of some images lie; empty without the former."""
    if reference is None:
        return Html("")
    if not reference.values.isfinite().all():
        return tag("p", "Energies of test images are NaN or inf: no histogram.", class_="warn")
    edges = bin_edges([reference.values], BINS)
    height = shares(reference.values, edges).tolist()
    x = [edge for edge in edges.tolist() for _ in range(2)]
    y = [0.0, *(value for value in height for _ in range(2)), 0.0]
    series = [Series(reference.text, 0, x, y)]
    for slot, (name, energy) in enumerate(marked, 1):
        label = name if math.isfinite(energy) else f"{name}: {energy}"
        series.append(Series(label, slot, [energy, energy], [0.0, max(height)]))
    ends = [e for e in (x[0], x[-1], *(energy for _, energy in marked)) if math.isfinite(e)]
    margin = 0.04 * (max(ends) - min(ends))
    wide = (min(ends) - margin, max(ends) + margin)
    return _chart("Energies of test images", series, Axes("", "E(x)", "share of images", wide))


def course(shown: ShownModel, states: Sequence[State], label: int | None) -> Html:
    """E(x), and E(x, y) of a class, at each step."""
    steps = [float(state.step) for state in states]
    energy = [state.view.energy for state in states]
    series = [Series("E(x)", 0, steps, energy)]
    if label is not None:
        joint = [e - float(state.view.probabilities[label].log())
                 for e, state in zip(energy, states, strict=True)]  # fmt: skip
        series.append(Series(f"E(x, y), y = {shown.classes[label]}", 1, steps, joint))
    last = max(1.0, steps[-1])
    return _chart("Energy step by step", series, Axes("", "step", "energy", (0.0, 1.02 * last)))


def _chart(title: str, series: Sequence[Series], axes: Axes) -> Html:
    """Curves as an image, so that its style and the page's are apart."""
    chart = lines(series, axes._replace(title=title))
    panel = Panel(title, chart, [key_of(line) for line in series])
    source = base64.b64encode(picture([panel], columns=1).encode()).decode()
    return Html(f'<img class="chart" alt="{title}" src="data:image/svg+xml;base64,{source}">')


def before_and_after(
    shown: ShownModel,
    states: Sequence[State],
    label: int | None,
    reference: Reference | None,
    *,
    steps: int,
) -> str:
    """The first and the last state so far, their difference, the energies, the histogram."""
    first, last = states[0], states[-1]
    change = last.x - first.x
    far = float(change.abs().max())
    grey = 0.5 + (change / (2 * far) if far > 0 else change)
    row = [
        pixels(first.x, "before", _said(shown, first)),
        pixels(last.x, f"after {last.step} of {steps} steps", _said(shown, last)),
        pixels(grey, "difference", f"at most {number(255 * far)}/255", "grey is 0"),
    ]
    marked = [("before", first.view.energy), ("after", last.view.energy)]
    charts = [course(shown, states, label), histogram(reference, marked)]
    return block(tag("div", *row, class_="row"), tag("div", *charts, class_="row"))


def _said(shown: ShownModel, state: State) -> str:
    view = state.view
    p = float(view.probabilities[view.label])
    return f"{shown.classes[view.label]} ({percent(p)}), E(x) = {number(view.energy)}"


def generated(
    shown: ShownModel, x: Tensor, looked: Sequence[View], reference: Reference | None
) -> str:
    """Images [n, C, H, W] with their classes, and their mean energy in the histogram."""
    figures = []
    for i, view in enumerate(looked):
        p = float(view.probabilities[view.label])
        more = f"{shown.classes[view.label]} ({percent(p)})", f"E(x) = {number(view.energy)}"
        figures.append(pixels(x[i : i + 1], f"image {i + 1}", *more))
    mean = float(torch.tensor([view.energy for view in looked], dtype=torch.float64).mean())
    return block(
        tag("div", *figures, class_="row strip"),
        histogram(reference, [("mean E(x) of these images", mean)]),
    )


def sampler(shown: ShownModel) -> str:
    """The model's own chain, in a line."""
    words = f"The model's own sampler on E(x), begun at the image: {shown.model.density.sampler!r}."
    return block(tag("p", words, class_="soft"))
