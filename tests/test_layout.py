"""A layout is a rule or a measurement; what was measured once holds for whoever reads the run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import every_rank
from toys import toy_recipe, toy_registry

import jemkit as api
from jemkit import Trainer
from jemkit.assembly import with_layout
from jemkit.layout import faster_layout, laid_out
from jemkit.networks import WRN, SmallCNN
from jemkit.runtime.folder import RunFolder
from jemkit.testing import toy_batch, toy_model, toy_task
from jemkit.verify import verify_resume

TASK = toy_task()
CPU = torch.device("cpu")


def is_last(model: Any) -> bool:
    weights = [p for p in model.parameters() if p.ndim == 4 and min(p.shape[1:]) > 1]
    assert weights
    return all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)


@pytest.mark.parametrize(
    ("choice", "norm", "last"),
    [
        ("auto", "batch", True),
        ("auto", "instance", False),
        ("yes", "instance", True),
        ("no", "batch", False),
    ],
)
def test_auto_is_channels_last_but_with_instance_norm_on_a_cpu(
    choice: Any, norm: Any, last: bool
) -> None:
    model = toy_model(TASK, SmallCNN(channels=2, norm=norm))
    assert is_last(laid_out(model, choice, CPU)) == last


class Slow(torch.nn.Module):
    """Takes its time in one of the layouts."""

    def __init__(self, inner: Any, *, last: bool) -> None:
        super().__init__()
        self.inner, self.last, self.width = inner, last, inner.width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if is_last(self.inner) == self.last:
            for _ in range(50):
                self.inner(x)
        return self.inner(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("slow", [True, False])
def test_the_layout_that_is_faster_is_found_and_weights_stay_what_they_are(slow: bool) -> None:
    model: Any = toy_model(TASK, WRN(depth=10, width=1))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    asking = [p.requires_grad for p in model.parameters()]
    model.network = Slow(model.network, last=slow)
    assert faster_layout(model, toy_batch(TASK).x) == ("no" if slow else "yes")
    model.network = model.network.inner
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == asking
    assert model.training


def asked(*overrides: str) -> Any:
    return toy_recipe(toy_registry(), "sadajem", "ebjdat", "plain", *overrides)


def test_what_was_measured_stands_in_the_runs_config(tmp_path: Path) -> None:
    short = ("run.channels_last=measure", "run.epochs=1")
    api.train(asked(*short), tmp_path / "a", registry=toy_registry(), latest=tmp_path)
    kept = RunFolder(tmp_path / "a").config
    assert kept["recipe"]["run"]["channels_last"] in ("yes", "no")
    assert kept["origins"]["run.channels_last"] == "measured"
    told = [json.loads(line) for line in (tmp_path / "a" / "events.jsonl").open()]
    (layout,) = [event for event in told if event["event"] == "layout"]
    assert layout["channels_last"] == kept["recipe"]["run"]["channels_last"]


def measurements(caplog: pytest.LogCaptureFixture) -> int:
    return sum(record.name == "jemkit.layout" for record in caplog.records)


def test_a_run_that_goes_on_is_not_measured_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "jemkit.layout")
    recipe = asked("run.channels_last=measure", "run.epochs=1")
    for resume in (False, True):
        api.train(recipe, tmp_path / "a", registry=toy_registry(), latest=tmp_path, resume=resume)
    assert measurements(caplog) == 1


def test_the_runs_of_verify_resume_are_measured_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "jemkit.layout")
    assert verify_resume(asked("run.channels_last=measure"), tmp_path, steps=2).exact
    assert measurements(caplog) == 1


class Small(torch.nn.Module):
    """Has room for four images; notes whether torch's algorithms are deterministic."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.width, self.seen = inner, inner.width, set[bool]()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.add(torch.are_deterministic_algorithms_enabled())
        if len(x) > 4:
            raise MemoryError("no room")
        return self.inner(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("micro_batch", [0, 4])
def test_a_measurement_is_in_the_runs_micro_batches_and_by_its_switches(micro_batch: int) -> None:
    recipe = asked(
        "run.channels_last=measure", "run.batch_size=9", f"run.micro_batch={micro_batch}",
        "run.deterministic=true",
    )  # fmt: skip
    model: Any = toy_model(TASK)
    small = model.network = Small(model.network)
    run = with_layout(recipe.recipe.run, model, TASK)
    assert run.channels_last in ("yes", "no")
    assert run.micro_batch == micro_batch
    assert small.seen == {True}


def test_a_layout_by_the_rule_is_not_called_measured(tmp_path: Path) -> None:
    trainer = Trainer(asked("run.channels_last=measure"), RunFolder.create(tmp_path / "a"))
    assert trainer.measured in ("yes", "no")
    trainer.parts = trainer.parts._replace(channels_last="auto")  # as among several processes
    assert trainer.measured is None


def test_processes_that_would_measure_apart_keep_to_the_rule() -> None:
    assert every_rank(built) == ["auto", "auto"]


def built() -> str:
    run = asked("run.channels_last=measure").recipe.run
    return with_layout(run, toy_model(TASK), TASK).channels_last
