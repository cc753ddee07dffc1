"""Run folders with everything in them that a report can show, written in a moment."""

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from jemkit.metrics import record as records
from jemkit.metrics.evaluator import Notes
from jemkit.metrics.figures import Figure, plain, share
from jemkit.metrics.record_file import Record
from jemkit.runtime.files import write_json

N = 200
RECIPE: dict[str, Any] = {
    "backbone": {"use": "sadajem", "steps": 5, "buffer": {"capacity": 1000}},
    "objective": {"use": "ebjdat", "w1": 0.45},
    "run": {"seed": 0, "epochs": 20},
}


def card(**more: Any) -> dict[str, Any]:
    """A protocol as an evaluation gives it."""
    return {
        "protocol": "standard", "standard": True, "split": "test", "images": N,
        "selection": "all", "quick": False, "seed": 0, "batch_size": 250, "norm": "Linf",
        "radius_px": 8.0, "trained_radius_px": 8.0, "checkpoint": "ab" * 32, "device": "cpu",
        "versions": {"jemkit": "0.1.0", "torch": "2.13.0"}, **more,
    }  # fmt: skip


def rows(right: int, seed: int = 0, n: int = N) -> torch.Tensor:
    """Which images are right: as many as are wanted, at places of the seed's choice."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return order < right


def record(right: dict[str, int] | None = None, seed: int = 0, **more: Any) -> Record:
    """Accuracies with their rows; `more` joins every card."""
    right = right or {"clean": 180, "pgd20": 120, "aa": 110}
    figures = []
    for name, count in right.items():
        attack = {} if name == "clean" else {"attack": name, "steps": 20, "step_px": 2.0}
        figures.append(share(name, count, N, card(**attack, **more)))
    tables = {name: rows(count, seed) for name, count in right.items()}
    return Record({"run": "made", "data": "digits", "sha256": "ab" * 32}, card(**more), figures,
                  rows=tables)  # fmt: skip


def full_record(shift: float = 0.0, **more: Any) -> Record:
    """A record with every table that a report draws."""
    base = record(
        {"clean": 180 - int(20 * shift), "pgd20": 120, "aa": 110 + int(9 * shift)}, **more
    )
    others = {"ece": 0.031 + shift / 50, "nll": 0.4, "gap_mean": 0.117 + shift, "gap_relative": 0.6}
    others |= {"auroc/noise": 0.97 - shift / 9, "fid": 38.2 - 9 * shift}
    figures: list[Figure] = [*base.figures]
    figures += [plain(name, value, N, card(**more)) for name, value in others.items()]
    left_out = {"generation": "needs more images than there are"} if shift else {}
    return Record(
        {**base.subject, "backbone": "sadajem", "objective": "ebjdat"}, base.protocol, figures,
        tables(shift), base.rows, left_out,
        ["clean accuracy is low"] if shift else [],
    )  # fmt: skip


def tables(shift: float) -> dict[str, Any]:
    edges = np.linspace(-14, -2, 41)
    middles = (edges[1:] + edges[:-1]) / 2

    def bumps(centre: float) -> list[float]:
        return [round(40 * math.exp(-((m - centre) ** 2) / 2)) for m in middles]

    bins = [i / 20 for i in range(21)]
    confidence = [(i + 0.5) / 20 for i in range(20)]
    curve = [[r, *_interval(0.9 * math.exp(-r / (9 + 4 * shift)))] for r in (0, 2, 4, 8, 12, 16)]
    names = ("random noise does as well", "loss stays flat", "more steps help", "larger radius")
    return {
        "energies": {
            "edges": edges.tolist(), "clean": bumps(-9), "adversarial": bumps(-8 + shift),
            "generated": bumps(-10 + shift), "n": {"clean": N, "adversarial": N, "generated": 100},
            "mean": {"clean": -9.0, "adversarial": -8 + shift, "generated": -10 + shift},
            "joint": {"edges": edges.tolist(), "clean": bumps(-8), "adversarial": bumps(-6)},
        },
        "energy_confidence": [[-14 + i / 9, 0.2 + i / 130, float(i % 7 > 0)] for i in range(99)],
        "ood_energies": {
            "edges": edges.tolist(), "test": bumps(-9), "noise": bumps(-5), "textures": bumps(-7),
            "n": {"test": N, "noise": N, "textures": N, "broken": N},
        },
        "energy_path": {
            "steps": list(range(0, 21, 4)), "mean": [-9 + 0.1 * i + shift for i in range(6)],
            "joint": [-8.5 + 0.2 * i for i in range(6)],
        },
        "radius_curve": {"norm": "Linf", "attack": "pgd", "points": curve, "n": N},
        "steps_curve": {
            "norm": "Linf", "attack": "pgd", "n": N,
            "points": [[k, *_interval(0.5 + 0.4 / k)] for k in (1, 5, 10, 20, 50)],
        },
        "reliability": {
            "edges": bins, "confidence": confidence,
            "accuracy": [min(1.0, c * (0.9 + shift / 10)) for c in confidence],
            "count": [0, 0, 1, 2, 3, 2, 4, 4, 6, 5, 7, 8, 9, 9, 12, 14, 18, 22, 31, 43],
        },
        "ood": {
            name: {
                score: {"auroc": 0.9 + at / 100, "aupr": 0.88, "fpr95": 0.3 - shift / 10, "n": N}
                for at, score in enumerate(("energy", "confidence"))
            }
            for name in ("noise", "textures")
        },
        "indicators": {
            "pgd20": [
                {
                    "name": name, "flag": at == 1 and shift > 0, "found": f"{0.1 * at:.1f}",
                    "means": "the attack may have stopped early", "do": "raise the steps",
                }
                for at, name in enumerate(names)
            ]
        },
    }  # fmt: skip


def _interval(p: float) -> list[float]:
    half = 1.96 * (p * (1 - p) / N) ** 0.5
    return [p, max(0.0, p - half), min(1.0, p + half)]


def png(seed: int = 0, size: int = 96) -> bytes:
    """Blots, as a sample grid may have."""
    noise = np.random.default_rng(seed).integers(0, 255, (size // 8, size // 8), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((4 * size, 4 * size), Image.Resampling.NEAREST).save(
        buffer, "PNG"
    )
    return buffer.getvalue()


def metrics(steps: int = 1500, shift: float = 0.0) -> str:
    """A metrics.csv that falls, with two values that are not finite."""
    noise = np.random.default_rng(int(10 * shift)).normal(0, 0.05, (steps, 2))
    lines = ["step,epoch,loss,loss p(x),E(x),gap x~ x,gradient norm"]
    for i in range(steps):
        loss = 0.3 + 2 * math.exp(-i / 300) + noise[i, 0] + shift / 4
        cell = "nan" if i in (700, 701) else f"{loss:.5f}"
        lines.append(f"{i},{1 + i // 75},{cell},{noise[i, 1]:.5f},{-2 - i / 200:.4f},0.1,1.5")
    return "\n".join(lines) + "\n"


def whole_run(folder: Path, shift: float = 0.0, recipe: dict[str, Any] | None = None,
              **more: Any) -> Path:  # fmt: skip
    """A run with a recipe, metrics, events, samples and a full record."""
    bare_run(folder, full_record(shift, **more), recipe)
    (folder / "metrics.csv").write_text(metrics(shift=shift))
    events = [{"event": "start", "step": 0}]
    events += [
        {"event": "epoch", "epoch": e, "step": 75 * e, "accuracy": 1 - 0.5 / e - shift / 20,
         "pgd10": 0.7 - 0.5 / e}
        for e in range(1, 21)
    ]  # fmt: skip
    (folder / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    (folder / "samples").mkdir()
    for epoch in (9, 10):
        (folder / "samples" / f"epoch-{epoch:04d}.png").write_bytes(png(epoch))
    (folder / "evaluation").mkdir()
    for at, name in enumerate(("samples", "neighbours", "samples-top90", "mine")):
        (folder / "evaluation" / f"{name}.png").write_bytes(png(at))
    return folder


def bare_run(folder: Path, stored: Record, recipe: dict[str, Any] | None = None) -> Path:
    """A run with its recipe and record alone."""
    records.save(folder, stored, Notes())
    origins = {"run.seed": "default", "run.epochs": "option"}
    write_json(folder / "config.json", {"recipe": recipe or RECIPE, "origins": origins})
    return folder
