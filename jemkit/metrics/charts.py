"""Charts as SVG: lines with intervals, histograms, scatter plots; inline or as a file."""

import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from textwrap import wrap
from typing import Any, NamedTuple

from jemkit.runtime.html import Html, join, tag

WIDTH, HEIGHT = 360.0, 236.0
LEFT, RIGHT, TOP, BOTTOM = 52.0, 10.0, 12.0, 36.0
TITLE, LINE = 42, 16.0
"""Characters in a line of a title, and its height."""
MARKS = ("circle", "square", "diamond", "up", "down", "cross", "plus", "ring")
COLOURS = len(MARKS)
LARGEST = 1e150  # what is larger is no number that a chart has room for; it is a gap like NaN
SMALLEST = 1e-300  # half of a smaller number may be 0
Pair = tuple[float, float]


class Series(NamedTuple):
    """One curve: x and y [N], optionally with an interval; non-finite values are gaps."""

    label: str
    slot: int  # which colour, dash and marker
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    marked: bool = False


class Axes(NamedTuple):
    """The labels of the axes, and values that they must include."""

    title: str
    x: str
    y: str
    x_range: Pair | None = None
    y_range: Pair | None = None
    diagonal: bool = False


class Key(NamedTuple):
    """An entry of a legend."""

    sign: Html
    words: str
    full: str = ""  # the whole name, if the words shorten it
    label: str = ""  # such as "non-standard"


class Panel(NamedTuple):
    """A chart with its title and legend."""

    title: str
    chart: Html
    legend: Sequence[Key] = ()
    name: str = ""  # of its file
    label: str = ""  # such as "non-standard"
    notes: Sequence[str] = ()


class _Scale(NamedTuple):
    """From values in these ranges to the drawing."""

    xs: Pair
    ys: Pair

    def x(self, value: float) -> float:
        low, high = self.xs
        return LEFT + (value - low) / (high - low) * (WIDTH - RIGHT - LEFT)

    def y(self, value: float) -> float:
        low, high = self.ys
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - BOTTOM - TOP)

    def points(self, x: Sequence[float], y: Sequence[float]) -> list[Pair]:
        return [(self.x(a), self.y(b)) for a, b in zip(x, y, strict=True)]


def lines(series: Sequence[Series], axes: Axes) -> Html:
    """Curves in one chart."""
    xs = axes.x_range or _range([v for s in series for v in s.x])
    ys = axes.y_range or _range([v for s in series for v in (*s.y, *s.low, *s.high)], 0.05)
    scale = _Scale(xs, ys)
    parts = [_frame(scale, axes)]
    if axes.diagonal:
        ends = scale.points((0.0, 1.0), (0.0, 1.0))
        parts.append(tag("path", d=_path(ends), class_="diagonal"))
    parts += [_band(s, scale) for s in series if s.low]
    parts += [_curve(s, scale) for s in series]
    return _svg(axes.title, parts)


def histograms(
    table: Mapping[str, Any], names: Mapping[str, str], slot: int, axes: Axes
) -> tuple[Html, list[Key]]:
    """The named sets of a table of `jemkit.metrics.figures.histograms`, and their legend."""
    present = [name for name in names if table.get(name)]
    shares = {name: [v / (sum(table[name]) or 1.0) for v in table[name]] for name in present}
    legend = []
    for at, name in enumerate(present):
        words = [names[name]]
        words += [f"{table['n'][name]} images"] if name in table.get("n", {}) else []
        words += [f"mean {table['mean'][name]:.3g}"] if name in table.get("mean", {}) else []
        outline = tag("path", d="M1 11V3H25V11", class_=f"set set{at} s{slot % COLOURS}")
        legend.append(Key(_key(outline), ", ".join(words)))
    return histogram(table["edges"], shares, slot, axes), legend


def histogram(
    edges: Sequence[float], shares: Mapping[str, Sequence[float]], slot: int, axes: Axes
) -> Html:
    """Outlines of several sets over the same bins: the first is filled, the next are dashed."""
    edges = edges or (0.0, 1.0)
    top = max([value for share in shares.values() for value in share] or [1.0])
    scale = _Scale((min(edges), max(edges)), (0.0, top * 1.06 or 1.0))
    parts = [_frame(scale, axes)]
    x = [edge for edge in edges for _ in range(2)]
    for at, share in enumerate(shares.values()):
        y = [0.0, *(value for value in share for _ in range(2)), 0.0]
        path = _path(scale.points(x[: len(y)], y))
        parts.append(tag("path", d=path, class_=f"set set{at} s{slot % COLOURS}"))
    return _svg(axes.title, parts)


def scatter(right: Sequence[Pair], wrong: Sequence[Pair], slot: int, axes: Axes) -> Html:
    """Points (x, y) in two groups: circles, and squares in the next colour."""
    xs = axes.x_range or _range([x for x, _ in (*right, *wrong)], 0.03)
    ys = axes.y_range or _range([y for _, y in (*right, *wrong)], 0.03)
    scale = _Scale(xs, ys)
    dots = [_dots([(scale.x(x), scale.y(y)) for x, y in group], slot, at)
            for at, group in enumerate((right, wrong))]  # fmt: skip
    return _svg(axes.title, [_frame(scale, axes), *dots])


def _dots(points: Sequence[Pair], slot: int, at: int) -> Html:
    path = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in points if _there(x, y))
    return tag("path", d=path, class_=f"dots{' wrong' * at} s{(slot + at) % COLOURS}")


def dots_key(slot: int, at: int) -> Html:
    """A point of a scatter plot's group for a legend."""
    return _key(_dots([(13, 6)], slot, at))


def picture(panels: Sequence[Panel], columns: int = 2) -> str:
    """A file with charts side by side, each with title and legend."""
    rows = max(len(panel.legend) for panel in panels)
    above = [wrap(_labelled(panel.title, panel.label), TITLE) for panel in panels]
    top = LINE * (max(map(len, above)) - 1)
    width, height = WIDTH + 24, HEIGHT + 52 + 16 * rows + top
    parts = []
    for at, panel in enumerate(panels):
        keys = (
            tag("g", sign, _words(_labelled(words, label), 32, 10, "start"),
                transform=f"translate({LEFT} {HEIGHT + 38 + top + 16 * row})")
            for row, (sign, words, _, label) in enumerate(panel.legend)
        )  # fmt: skip
        title = [
            _words(line, 8, 20 + LINE * i, "start", "title") for i, line in enumerate(above[at])
        ]
        chart = tag("g", panel.chart, transform=f"translate(0 {30 + top:g})")
        x, y = at % columns * width + 8, at // columns * height
        parts.append(tag("g", *title, chart, *keys, transform=f"translate({x:g} {y:g})"))
    size = min(columns, len(panels)) * width, -(-len(panels) // columns) * height
    whole = tag(
        "svg", tag("style", Html(style())),
        tag("rect", width="100%", height="100%", class_="paper"), *parts,
        xmlns="http://www.w3.org/2000/svg", width=f"{size[0]:g}", height=f"{size[1]:g}",
        viewBox=f"0 0 {size[0]:g} {size[1]:g}", class_="chart", font_family="system-ui, sans-serif",
    )  # fmt: skip
    return f"{whole}\n"


def _labelled(words: str, label: str) -> str:
    return f"{words} ({label})" if label else words


def style() -> str:
    """The colours and strokes of charts, for light and dark."""
    return files(__package__).joinpath("charts.css").read_text(encoding="utf-8")


def mark(slot: int, x: float = 6.0, y: float = 6.0, r: float = 3.4, words: str = "") -> Html:
    """The marker of a run; the words are shown on hover."""
    title = tag("title", words) if words else None
    kind = MARKS[slot % COLOURS]
    shapes = {
        "square": f"M{-r} {-r}H{r}V{r}H{-r}Z",
        "diamond": f"M0 {-1.3 * r}L{1.3 * r} 0L0 {1.3 * r}L{-1.3 * r} 0Z",
        "up": f"M0 {-1.2 * r}L{1.2 * r} {r}H{-1.2 * r}Z",
        "down": f"M0 {1.2 * r}L{1.2 * r} {-r}H{-1.2 * r}Z",
        "cross": f"M{-r} {-r}L{r} {r}M{-r} {r}L{r} {-r}",
        "plus": f"M{-r} 0H{r}M0 {-r}V{r}",
    }
    style = f"mark {kind} s{slot % COLOURS}"
    if kind in shapes:
        at = f"translate({x:.1f} {y:.1f})"
        return tag("path", title, d=shapes[kind], class_=style, transform=at)
    return tag("circle", title, cx=f"{x:.1f}", cy=f"{y:.1f}", r=r, class_=style)


def key(slot: int, *, marked: bool = True) -> Html:
    """A run's line for a legend, with its marker if the curve has markers."""
    line = tag("path", d="M1 6H25", class_=f"line s{slot % COLOURS}")
    return _key(line, mark(slot, 13)) if marked else _key(line)


def key_of(series: Series) -> Key:
    """The legend's entry of a curve, as it is drawn."""
    return Key(key(series.slot, marked=series.marked), series.label)


def _key(*parts: Html) -> Html:
    return tag(
        "svg", *parts, viewBox="0 0 26 12", width=26, height=12, class_="key", aria_hidden="true"
    )  # fmt: skip


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers within a range, in steps of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * k for k in (1, 2, 5, 10) if power * k >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _svg(title: str, parts: Sequence[Html]) -> Html:
    return tag(
        "svg", *parts, viewBox=f"0 0 {WIDTH:g} {HEIGHT:g}", width=f"{WIDTH:g}",
        height=f"{HEIGHT:g}", class_="chart", role="img", aria_label=title,
    )  # fmt: skip


def _frame(scale: _Scale, axes: Axes) -> Html:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for value in ticks(*scale.ys):
        y = f"{scale.y(value):.1f}"
        parts.append(tag("line", x1=LEFT, x2=right, y1=y, y2=y, class_="grid"))
        parts.append(_words(_number(value), LEFT - 6, scale.y(value) + 3.5, "end"))
    for value in ticks(*scale.xs):
        x = f"{scale.x(value):.1f}"
        parts.append(tag("line", x1=x, x2=x, y1=bottom, y2=bottom + 4, class_="axis"))
        parts.append(_words(_number(value), scale.x(value), bottom + 15, "middle"))
    parts.append(tag("line", x1=LEFT, x2=right, y1=bottom, y2=bottom, class_="axis"))
    parts.append(_words(axes.x, (LEFT + right) / 2, HEIGHT - 4, "middle", "label"))
    middle = (TOP + bottom) / 2
    turned = f"rotate(-90 10 {middle:g})"
    parts.append(_words(axes.y, 10, middle, "middle", "label", transform=turned))
    return tag("g", *parts)


def _words(what: str, x: float, y: float, anchor: str, class_: str = "tick", **more: str) -> Html:
    at = {"x": f"{x:.1f}", "y": f"{y:.1f}", "text_anchor": anchor, "class_": class_}
    return tag("text", what, **at, **more)


def _curve(series: Series, scale: _Scale) -> Html:
    points = scale.points(series.x, series.y)
    line = tag("path", d=_path(points), class_=f"line s{series.slot % COLOURS}")
    values = zip(points, series.x, series.y, strict=True) if series.marked else ()
    signs = [mark(series.slot, *at, 3.0, f"{x:g}: {y:.5g}") for at, x, y in values if _there(*at)]
    return join(line, *signs)


def _band(series: Series, scale: _Scale) -> Html:
    """The interval of each point; points without one have none drawn."""
    parts = []
    for x, low, high in zip(series.x, series.low, series.high, strict=True):
        if _there(low, high):
            ends = _path(scale.points((x, x), (low, high)))
            parts.append(tag("path", d=ends, class_=f"bar s{series.slot % COLOURS}"))
    return join(*parts)


def _path(points: Sequence[Pair]) -> str:
    """M and L through the points, restarting after a gap; a single point is a dot."""
    commands, pen = [], "M"
    for x, y in points:
        if not _there(x, y):
            pen = "M"
            continue
        commands.append(f"{pen}{x:.1f} {y:.1f}" + ("h0" if pen == "M" else ""))
        pen = "L"
    return "".join(commands)


def _there(*values: float) -> bool:
    return all(abs(value) < LARGEST for value in values)


def _range(values: Sequence[float], margin: float = 0.0) -> Pair:
    """A range that contains every finite value; never empty."""
    good = [value for value in values if abs(value) < LARGEST]
    low, high = (min(good), max(good)) if good else (0.0, 1.0)
    if high - low <= 1e-12 * max(abs(low), abs(high), 1.0):
        below, above = (abs(end) if abs(end) > SMALLEST else 1.0 for end in (low, high))
        low, high = low - 0.5 * below, high + 0.5 * above
    extra = (high - low) * margin
    return low - extra, high + extra


def _number(value: float) -> str:
    size = abs(value)
    if 1e4 <= size < 1e7:
        return f"{value / 1000:g}k"
    return f"{value:g}".replace("-", "−") if size else "0"
