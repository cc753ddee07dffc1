"""A run with averaged weights, its copies, and their clean accuracy."""

import shutil
from pathlib import Path

import torch
from toys import toy_recipe

from jemkit import train
from jemkit.config.eval_settings import settings_of
from jemkit.config.registry import Registry
from jemkit.evaluation.evaluate import judge
from jemkit.evaluation.subjects import subject_at

CPU = torch.device("cpu")


def copied(run: Path, to: Path) -> Path:
    return Path(shutil.copytree(run, to / run.name))


def clean(path: Path, parts: Registry) -> float:
    subject = subject_at(path, parts, CPU)._replace(folder=None)
    settings = settings_of({"only": ("accuracy",)})
    return judge(subject, settings, parts).value("clean")


def averaged_run(parts: Registry, root: Path) -> Path:
    """A run of two epochs that keeps an average of its weights."""
    run = root / "averaged"
    train(toy_recipe(parts, "sadajem", "ebjdat", "plain", "run.ema_decay=0.5"), run, registry=parts)
    return run
