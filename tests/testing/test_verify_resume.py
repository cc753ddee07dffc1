"""verify-resume finds exact what is, and names the part of the state that is forgotten."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from toys import toy_recipe, toy_registry
from typer.testing import CliRunner

from jemkit import Backbone, ConfigError, Options, Terms, hookimpl
from jemkit.config.recipe import complete
from jemkit.config.registry import Plugin
from jemkit.runtime.run_dir import RunFolder
from jemkit.testing.resume import cut_points, verify_resume
from jemkit_cli.verify import verify_resume as command

REGISTRY = toy_registry()


def test_the_cuts_lie_within_epochs_and_at_an_end() -> None:
    assert [step for step, _ in cut_points(6, 3)] == [1, 3, 4]
    assert [step for step, _ in cut_points(6, 100)] == [1, 3, 5]
    assert [step for step, _ in cut_points(2, 1)] == [1]
    assert [step for step, _ in cut_points(7, 2)] == [1, 2]
    assert [step for step, _ in cut_points(8, 3)] == [1, 3, 7]
    assert dict(cut_points(6, 3))[4] == "within epoch 2, after step 4"


@pytest.mark.parametrize(
    "names",
    [
        ("sadajem", "ebjdat", "sam", "run.ema_decay=0.9"),
        ("jem", "jem", "plain", "optimizer.use=adam"),
        ("classifier", "ce", "awp"),
    ],
    ids=lambda names: "-".join(names[:3]),
)
def test_what_comes_with_jemkit_is_exact(tmp_path: Path, names: tuple[str, ...]) -> None:
    verdict = verify_resume(toy_recipe(REGISTRY, *names), tmp_path)
    assert verdict.exact, verdict.cuts
    assert (verdict.steps, verdict.steps_per_epoch) == (6, 3)
    assert [cut.step for cut in verdict.cuts] == [1, 3, 4]
    assert {"model", "optimizer", "loader", "rng", "metrics", "history"} <= set(verdict.compared)
    assert verdict.compared["model"] > 5


class Forgetful(Options):
    """An objective with a memory that it does not save."""

    needs_density: bool = False

    def build(self, task: Any, rng: torch.Generator) -> "Forgets":
        return Forgets()


class Forgets:
    needs_density = False

    def __init__(self) -> None:
        self.count = 0

    def draw(self, backbone: Backbone, batch: Any, rng: torch.Generator) -> None:
        return None

    def loss(self, backbone: Backbone, batch: Any, draws: None) -> Terms:
        logits = backbone.scores({"x": batch.x})["x"].logits
        return Terms.weighted({"far": (1.0 + self.count, logits.square().mean())})

    def after(self, backbone: Backbone, batch: Any, draws: None, rng: torch.Generator) -> None:
        self.count += 1

    def parameters(self) -> list[torch.nn.Parameter]:
        return []

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class ForgetfulPlugin:
    @staticmethod
    @hookimpl
    def jemkit_objectives() -> dict[str, Any]:
        return {"forgetful": Forgetful}


def test_a_state_that_is_not_saved_is_detected_and_named(tmp_path: Path) -> None:
    registry = toy_registry([Plugin("forgetful", ForgetfulPlugin)])
    verdict = verify_resume(toy_recipe(registry, "classifier", "forgetful"), tmp_path, steps=4)
    assert not verdict.exact
    for cut in verdict.cuts:
        assert cut.differs["model"].startswith("model/")
        assert "loader" not in cut.differs


def test_one_step_cannot_be_cut(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="use 2 or more"):
        verify_resume(toy_recipe(REGISTRY), tmp_path, steps=1)


def test_torchs_own_generator_is_left_as_it_was(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    verify_resume(toy_recipe(REGISTRY, "classifier", "ce"), tmp_path, steps=2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.cuda
def test_cuda_is_exact_where_it_is_deterministic_and_refused_where_not(tmp_path: Path) -> None:
    recipe = toy_recipe(REGISTRY, "sadajem", "ebjdat", "sam", "run.device=cuda")
    with pytest.raises(ConfigError, match="--deterministic"):
        verify_resume(recipe, tmp_path)
    verdict = verify_resume(
        toy_recipe(
            REGISTRY, "sadajem", "ebjdat", "sam", "run.device=cuda", "run.deterministic=true"
        ),
        tmp_path,
    )
    assert verdict.exact, verdict.cuts


SMALL = {
    "run": {"batch_size": 8, "device": "cpu", "max_train": 100},
    "data": {"use": "digits"},
    "backbone": {
        "use": "jem", "steps": 1, "network": {"use": "smallcnn", "channels": 2},
        "buffer": {"capacity": 20},
    },
    "objective": {"use": "jem"},
}  # fmt: skip


def run_command(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, list(arguments))


def test_the_command_takes_a_recipe_or_a_run_and_ends_with_its_verdict(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps(SMALL))
    shown = run_command(str(tmp_path / "recipe.json"), "--steps=4")
    assert shown.exit_code == 0, shown.output
    assert "resume is exact, bit for bit" in shown.output
    assert "at the end of epoch 1" in " ".join(shown.output.split())
    run = RunFolder.create(tmp_path / "run")
    whole = complete(toy_recipe(REGISTRY, "classifier", "ce", "plain", "data.use=digits"), REGISTRY)
    run.write_config(whole.tables, whole.origins)
    done = run_command(str(run.path), "--steps=2", "--json", "--set=run.max_train=40")
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["exact"] is True
    assert record["cuts"][0]["step"] == 1
    assert sorted(p.name for p in run.path.iterdir()) == ["checkpoints", "config.json", "samples"]
    nothing = run_command(str(tmp_path / "none"))
    assert nothing.exit_code == 6
