"""Whatever makes a run diverge: it ends healthy, or stops with a checkpoint that can be loaded."""

import itertools
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from toys import BACKBONES, objective_of, toy_recipe, toy_registry

from jemkit import Diverged, Options, Terms, Trainer, hookimpl
from jemkit.config.registry import Plugin
from jemkit.runtime.checkpoint import load, newest
from jemkit.runtime.run_dir import RunFolder

Fault = Literal["nan", "inf", "-inf", "energy", "explosion", "weights", "collapse", "buffer"]
FAULTS: tuple[Fault, ...] = (
    "nan", "inf", "-inf", "energy", "explosion", "weights", "collapse", "buffer",
)  # fmt: skip
EPOCH, AT = 6, 20  # steps an epoch; the first sick step, in the fourth
LATE = 30  # of a collapse, which only a run can have that has learnt something
STEPS_OF: dict[str, list[int]] = defaultdict(list)
"""The steps that each test's objective was asked for, in order: one back is a new attempt."""


class Faulty(Options):
    """An objective that makes training sick from a step on, in its first `sick` attempts."""

    needs_density: ClassVar[bool] = True
    inner: ClassVar[Any] = objective_of("ebjdat")

    name: str
    fault: Fault
    at: int = AT
    sick: int = 1  # attempts
    cured_by: int = 1_000  # steps a chain, with which it is not sick either

    def is_sick(self, backbone: Any, step: int) -> bool:
        history = STEPS_OF[self.name]
        if not history or history[-1] != step:
            history.append(step)
        attempt = sum(b < a for a, b in itertools.pairwise(history))
        steps = backbone.density.steps if backbone.has_density else 0
        return step >= self.at and attempt < self.sick and steps < self.cured_by

    def draw(self, backbone: Any, batch: Any, rng: torch.Generator) -> Any:
        backbone.model.requires_grad_(True)
        if self.is_sick(backbone, batch.step):
            self.harm(backbone)
        draws = self.inner.draw(backbone, batch, rng)
        if self.fault == "weights" and batch.step % EPOCH == EPOCH - 1:  # no pass uses it before
            norms = [m for m in backbone.model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
            if self.is_sick(backbone, batch.step):
                norms[0].running_mean[0] = torch.inf
        return draws

    def harm(self, backbone: Any) -> None:
        if self.fault == "buffer":
            states = backbone.density.buffer.states
            states.copy_(states.sign())
        heads = [m for m in backbone.model.children() if isinstance(m, torch.nn.Linear)]
        with torch.no_grad():
            for p in (p for head in heads for p in head.parameters()):
                if self.fault == "explosion":
                    p.mul_(10.0)
                elif self.fault == "collapse":
                    p.zero_().requires_grad_(False)  # everything is of class 0, and stays

    def loss(self, backbone: Any, batch: Any, draws: Any) -> Terms:
        terms = self.inner.loss(backbone, batch, draws)
        if not self.is_sick(backbone, batch.step):
            return terms
        if self.fault in ("nan", "inf", "-inf"):
            return terms._replace(total=terms.total * float(self.fault))
        if self.fault == "energy":
            return terms._replace(watched={**terms.watched, "E(x)": torch.tensor(torch.nan)})
        return terms


class FaultyClassifier(Faulty):
    """The same of an objective without a density."""

    needs_density: ClassVar[bool] = False
    inner: ClassVar[Any] = objective_of("pgdat")


class Guest:
    @staticmethod
    @hookimpl
    def jemkit_objectives() -> dict[str, Any]:
        return {"faulty": Faulty, "faultyclassifier": FaultyClassifier}


REGISTRY = toy_registry([Plugin("guest", Guest)])


def begun(
    backbone: str, fault: str, out: Path, *overrides: str, sick: int = 1, watch: Any = None
) -> Trainer:
    """60 validation images tell a trained model from a guess; one epoch at chance suffices."""
    STEPS_OF.clear()
    objective = "faultyclassifier" if backbone == "classifier" else "faulty"
    recipe = toy_recipe(
        REGISTRY, backbone, objective, "plain", f"objective.name={backbone}-{fault}",
        f'objective.fault="{fault}"', f"objective.sick={sick}",
        f"objective.at={LATE if fault == 'collapse' else AT}",
        f"sentinel.collapse={1 if fault == 'collapse' else 2}",
        "run.epochs=50", "data.n=120", "run.valid_fraction=0.5", "optimizer.lr=0.1",
        "backbone.network.channels=8", *overrides,
    )  # fmt: skip
    return Trainer(recipe, RunFolder.create(out), watch)


def events(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]


def fits(backbone: str, fault: str) -> bool:
    return backbone not in ("classifier", "dat") or fault != "buffer"


CASES = [(b, f) for b in BACKBONES for f in FAULTS if fits(b, f)]
QUICK: list[tuple[str, Fault]] = [
    ("classifier", "nan"), ("jem", "inf"), ("mebm", "-inf"), ("sadajem", "energy"),
    ("jempp", "explosion"), ("jem", "weights"), ("classifier", "collapse"), ("jempp", "buffer"),
]  # fmt: skip
"""Every fault and every backbone; the slow test below takes them all together."""


def healed(backbone: str, fault: str, out: Path, sick: int) -> None:
    kinds: list[str] = []
    end = (LATE if fault == "collapse" else AT + 4) + EPOCH
    trainer = begun(backbone, fault, out, sick=sick, watch=lambda kind, _: kinds.append(kind))
    trainer.run(until=end)
    rollbacks = [event for event in events(out) if event["event"] == "rollback"]
    assert [event["attempt"] for event in rollbacks] == list(range(1, sick + 1))
    assert kinds.count("rollback") == sick
    for event in rollbacks:
        assert event["to"] % EPOCH == 0
        assert event["to"] <= event["since"] <= event["step"]
    assert [int(row["step"]) for row in trainer.folder.metrics()] == list(range(end))
    last = newest(out / "checkpoints")
    assert last is not None
    state = load(last)
    assert state["loader"]["step"] == end
    assert len(state["care"]["tried"]) == sick
    assert [e["epoch"] for e in state["history"]] == list(range(1, end // EPOCH + 1))


def given_up(backbone: str, fault: str, out: Path) -> None:
    trainer = begun(backbone, fault, out, "sentinel.tries=2", sick=99)
    with pytest.raises(Diverged) as caught:
        trainer.run(until=60)
    message = str(caught.value)
    assert caught.value.exit_code == 4
    assert re.search(r"diverged at step \d+: .* \(since step \d+\)", message)
    assert "attempt 1 rolled back" in message
    assert "attempt 2 rolled back" in message
    match = re.search(r"--init-from (\S+) starts from its weights", message)
    assert match
    state = load(Path(match[1]))
    assert all(t.isfinite().all() for t in state["model"].values())
    assert state["loader"]["step"] <= LATE
    assert events(out)[-1]["event"] == "diverged"


@pytest.mark.parametrize(("backbone", "fault"), QUICK)
def test_a_run_that_is_sick_once_goes_back_and_ends_healthy(
    backbone: str, fault: str, tmp_path: Path
) -> None:
    healed(backbone, fault, tmp_path / "run", 1)


@pytest.mark.parametrize(
    ("backbone", "fault"), [("jem", "-inf"), ("mebm", "explosion"), ("sadajem", "collapse")]
)
def test_a_run_that_stays_sick_stops_with_a_healthy_checkpoint(
    backbone: str, fault: str, tmp_path: Path
) -> None:
    given_up(backbone, fault, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(("backbone", "fault"), CASES)
def test_however_often_a_run_is_sick_it_ends_healthy_or_stops(
    backbone: str, fault: str, tmp_path: Path
) -> None:
    for sick in (1, 2, 3):
        healed(backbone, fault, tmp_path / f"{sick}", sick)
    given_up(backbone, fault, tmp_path / "given-up")
