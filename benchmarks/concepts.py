"""The pictures of docs/concepts.md, from four runs on digits.

jemkit train --out runs/ebjdat
jemkit train --objective jem --out runs/jem
jemkit train --backbone classifier --objective pgdat --out runs/plain
jemkit train --backbone classifier --objective pgdat --updater awp --out runs/awp
python benchmarks/concepts.py runs/ebjdat runs/jem runs/plain runs/awp
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from jemkit import PGD, Images, PixelModel, Threat, installed, load, moved_weights
from jemkit.metrics.charts import Axes, Panel, Series, histograms, key_of, lines, picture
from jemkit.metrics.plots import save_grid
from jemkit.runtime.files import write_text

IMAGES = Path(__file__).parents[1] / "docs" / "images"
STEPS = (0, 1, 2, 5, 10, 20, 40)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def attacked(subject: PixelModel, data: Images) -> Tensor:
    """The images under PGD-20, L-infinity 25.5/255."""
    (stage,) = PGD(steps=20).bind(subject, Threat("Linf", 25.5)).values()
    return stage(data.unit(), data.y, seeded())


def energies(subject: PixelModel, x: Tensor) -> Tensor:
    with torch.no_grad():
        return subject.scores(x).energy


def shares(sets: dict[str, Tensor], bins: int = 40) -> tuple[list[float], dict[str, list[float]]]:
    """The edges of common bins, and the share of each set in them."""
    values = torch.cat(list(sets.values()))
    edges = torch.linspace(float(values.min()), float(values.max()), bins + 1)
    counts = {name: torch.histogram(v, edges).hist / len(v) for name, v in sets.items()}
    return edges.tolist(), {name: count.tolist() for name, count in counts.items()}


def compared(title: str, x: str, sets: dict[str, Tensor]) -> Panel:
    edges, parts = shares(sets)
    table = {"edges": edges, **parts, "mean": {n: float(v.mean()) for n, v in sets.items()}}
    chart, legend = histograms(table, {n: n for n in sets}, 0, Axes(title, x, "share of images"))
    return Panel(title, chart, legend)


def chain(subject: PixelModel) -> None:
    """One chain per class, top to bottom after 0, 1, 2, 5, 10, 20 and 40 steps."""
    rows = [subject.sample(10, seeded(), steps=n, y=torch.arange(10)) for n in STEPS]
    save_grid(IMAGES / "chain.png", torch.cat(rows))


def density(subject: PixelModel, data: Images) -> None:
    x = data.unit()
    other = x[torch.randperm(len(x), generator=seeded())]
    noise = torch.rand(x.shape, generator=seeded())
    sets = {"digits": x, "means of two digits": (x + other) / 2, "uniform noise": noise}
    values = {name: energies(subject, images) for name, images in sets.items()}
    panel = compared("E(x) of SADA-JEM with EB-JDAT", "E(x)", values)
    write_text(IMAGES / "density.svg", picture([panel]))


def objective(ours: PixelModel, jem: PixelModel, data: Images) -> None:
    gaps = {name: energies(model, attacked(model, data)) - energies(model, data.unit())
            for name, model in (("EB-JDAT", ours), ("JEM", jem))}  # fmt: skip
    panel = compared("Energy gap under PGD-20", "E(x̃) − E(x)", gaps)
    write_text(IMAGES / "objective.svg", picture([panel]))


def updater(plain: PixelModel, awp: PixelModel, data: Images) -> None:
    """The cross-entropy of adversarial images as the weights move uphill."""
    sizes = [i / 500 for i in range(16)]
    curves = []
    for slot, (name, subject) in enumerate((("plain", plain), ("awp", awp))):
        x, losses = attacked(subject, data), []
        weights = [w for w in subject.parameters() if w.dim() > 1]
        for w in weights:
            w.requires_grad_(True)
        slopes = torch.autograd.grad(F.cross_entropy(subject(x), data.y), weights)
        for size in sizes:
            by = {w: size * w.norm() * s / s.norm() for w, s in zip(weights, slopes, strict=True)}
            with torch.no_grad(), moved_weights({w: d.detach() for w, d in by.items()}):
                losses.append(float(F.cross_entropy(subject(x), data.y)))
        curves.append(Series(name, slot, sizes, losses))
    title = "Loss near the weights"
    axes = Axes(title, "size of the move, relative to each weight", "cross-entropy of x̃",
                (0.0, 1.04 * sizes[-1]))  # fmt: skip
    chart = lines(curves, axes)
    panel = Panel(title, chart, list(map(key_of, curves)))
    write_text(IMAGES / "updater.svg", picture([panel]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs=4, type=Path)
    ours, jem, plain, awp = (load(run) for run in parser.parse_args().runs)
    data = installed()["dataset"]["digits"]().load("test")
    chain(ours)
    density(ours, data)
    objective(ours, jem, data)
    updater(plain, awp, data)


if __name__ == "__main__":
    main()
