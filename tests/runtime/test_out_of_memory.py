"""On OOM the micro-batch is halved, and the outcome is that of the smaller micro-batch."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import every_rank
from torch import Tensor, nn
from toys import (
    REGISTRY,
    CrampedPlugin,
    Room,
    gen,
    toy_recipe,
    toy_registry,
)

import jemkit as api
from jemkit import (
    PGD,
    ModelEnergy,
    Trainer,
)  # fmt: skip
from jemkit.attacks.base import Threat
from jemkit.attacks.pixel_model import pixel_model
from jemkit.config.registry import Plugin
from jemkit.errors import OutOfMemory
from jemkit.evaluation.export import export
from jemkit.evaluation.sample import sample
from jemkit.metrics.attack_runner import attacked
from jemkit.metrics.evaluator import Context
from jemkit.models.networks import SmallCNN
from jemkit.models.norms import Norm
from jemkit.runtime import distributed
from jemkit.runtime.checkpoint import load
from jemkit.runtime.microbatch import MicroBatch, out_of_memory, retry_on_oom
from jemkit.runtime.pytree import same
from jemkit.runtime.run_dir import RunFolder
from jemkit.testing import toy_model, toy_task

TASK = toy_task()
GUESTS = toy_registry([Plugin("cramped", CrampedPlugin, "jemkit")])
TINY = 1e-6  # a sum over slices is rounded apart from a sum over rows, and a row alone from many


def rowwise(norm: Norm = "group", seed: int = 0) -> Any:
    return toy_model(TASK, SmallCNN(channels=2, norm=norm), seed=seed)


def close(ours: Tensor, theirs: Tensor) -> bool:
    return torch.allclose(ours, theirs, rtol=TINY, atol=TINY)


def test_what_allocators_say_is_known_and_nothing_else_is() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**58)
    assert out_of_memory(caught.value)
    assert out_of_memory(RuntimeError("could not create a primitive"))  # oneDNN, seen at a limit
    assert out_of_memory(RuntimeError("GET was unable to find an engine to execute this"))  # cuDNN
    assert out_of_memory(MemoryError())
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not out_of_memory(RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        retry_on_oom(partial(failing, RuntimeError("shapes do not fit")))


def failing(error: Exception) -> None:
    raise error


@settings(max_examples=10)
@given(st.integers(1, 7), st.integers(1, 20))
def test_work_is_done_again_with_half_the_images_and_the_same_draws(room: int, n: int) -> None:
    network, rng, sizes = Room(SmallCNN(channels=1).build(TASK.shape), room), gen(3), []
    model = toy_model(TASK)
    model.network = network

    def work() -> Tensor:
        x = torch.randn((n, *TASK.shape), generator=rng)
        with torch.no_grad():
            return network_pass(x)

    def network_pass(x: Tensor) -> Tensor:
        return ModelEnergy(model).stem(x)

    micro = MicroBatch()
    features = micro.retry_on_oom(work, rng, on_change=lambda **what: sizes.append(what["images"]))
    tried = [n // 2**k for k in range(6) if n // 2**k]
    refused = [most for most in tried if -(-n // -(-n // most)) > room]  # in slices of equal size
    halvings = tried[1 : 1 + len(refused)]
    assert sizes == halvings
    assert micro.size == (halvings or [0])[-1]
    assert close(features, network.inner.stem(torch.randn((n, *TASK.shape), generator=gen(3))))


def recipe(*overrides: str, norm: str = "none") -> Any:
    """Two epochs of six steps; an update's pass has 9 + 9 + 9 + 9 images, a chain's 9."""
    small = ("objective.adv_steps=1", "backbone.network.use=cramped")
    options = (*small, f"backbone.network.norm={norm}", *overrides)
    return toy_recipe(GUESTS, "jem", "ebjdat", "sam", *options)


def trained(path: Path, *overrides: str) -> dict[str, Any]:
    """The state after an epoch, without what the clock and the recipe wrote."""
    one = recipe("run.epochs=1", *overrides)
    api.train(one, path, registry=GUESTS, latest=path.parent / "runs")
    state = load(path / "checkpoints" / "step-00000006")
    state["history"] = [{**entry, "seconds": 0} for entry in state["history"]]
    state.pop("config")
    return {**state, "seconds": 0}


def events(path: Path, kind: str) -> list[dict[str, Any]]:
    lines = (path / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def test_a_run_that_runs_out_of_memory_is_one_begun_with_what_fits(tmp_path: Path) -> None:
    halved = trained(tmp_path / "a", "backbone.network.images=12")
    begun = trained(tmp_path / "b", "run.micro_batch=9")
    assert same(halved, begun)
    changes = [
        (event["step"], event["was"], event["images"]) for event in events(tmp_path / "a", "memory")
    ]
    assert changes == [(0, 36, 18), (0, 18, 9)]
    assert not events(tmp_path / "b", "memory")
    ended = [events(tmp_path / name, "end")[0]["figures"] for name in "ab"]
    assert [f["value"] for f in ended[0]] == [f["value"] for f in ended[1]]


def test_a_run_goes_on_with_the_halved_micro_batch(tmp_path: Path) -> None:
    trainer = Trainer(recipe("backbone.network.images=12"), RunFolder.create(tmp_path / "a"))
    trainer.run(until=3)
    other = Trainer(recipe("backbone.network.images=12"), RunFolder.create(tmp_path / "b"))
    other.load_state_dict(load(tmp_path / "a" / "checkpoints" / "step-00000003"))
    assert other.parts.micro.size == 9
    other.run(until=6)
    trainer.run(until=6)
    assert not events(tmp_path / "b", "memory")
    assert same(other.backbone.model.state_dict(), trainer.backbone.model.state_dict())


def test_a_recipe_that_asks_for_less_than_the_checkpoint_gets_it(tmp_path: Path) -> None:
    trainer = Trainer(recipe("run.micro_batch=4"), RunFolder.create(tmp_path / "a"))
    for saved, wanted in ((9, 4), (0, 4), (2, 2)):
        trainer.parts.micro.size = 4
        trainer.load_state_dict({**trainer.state_dict(), "micro_batch": saved})
        assert trainer.parts.micro.size == wanted


def test_a_single_image_that_does_not_fit_ends_a_run_that_is_saved(tmp_path: Path) -> None:
    trainers = [Trainer(recipe(), RunFolder.create(tmp_path / name)) for name in "ab"]
    trainers[0].run(until=4)
    network = trainers[1].backbone.model.network

    def another_program_takes_the_rest() -> bool:
        network.images = 0 if trainers[1].step == 4 else 1000
        return False

    trainers[1].stop = another_program_takes_the_rest
    trainers[1].polling.patience = float("inf")  # asked between steps alone, however slow they are
    with pytest.raises(OutOfMemory, match=r"with 1 image\(s\) in a pass.*Step 4 is saved"):
        trainers[1].run()
    states = [load(tmp_path / name / "checkpoints" / "step-00000004") for name in "ab"]
    assert states[1]["micro_batch"] == 1
    assert same(*({**state, "micro_batch": 0, "seconds": 0} for state in states))
    assert "a smaller network" in events(tmp_path / "b", "memory")[-1]["ended"]


def test_batch_norm_that_does_not_fit_as_a_whole_says_so(tmp_path: Path) -> None:
    trainer = Trainer(
        recipe("backbone.network.images=4", norm="batch"), RunFolder.create(tmp_path / "a")
    )
    with pytest.raises(OutOfMemory, match="batch norm computes its statistics over all of them"):
        trainer.run()


def test_an_update_that_has_begun_is_not_taken_again() -> None:
    done: list[int] = []

    def work() -> None:
        done.append(1)
        raise MemoryError

    with pytest.raises(OutOfMemory, match="which cannot be undone") as caught:
        MicroBatch().retry_on_oom(work, moved=lambda: len(done))
    assert not caught.value.undone
    assert len(done) == 1


def in_a_group() -> dict[str, str]:
    with distributed.together():
        try:
            retry_on_oom(partial(failing, torch.OutOfMemoryError("CUDA out of memory")))
        except OutOfMemory as error:
            return {"told": str(error), "undone": str(error.undone)}
    return {}


def test_a_process_of_several_names_the_option_and_does_not_try_alone() -> None:
    for rank, answer in enumerate(every_rank(in_a_group)):
        assert f"process {rank} of 2 ran out of memory" in answer["told"]
        assert "--set run.micro_batch=" in answer["told"]
        assert answer["undone"] == "False"


class Cut(nn.Module):
    """A classifier of images with room for so many of them."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.inner, self.room = rowwise("none"), room

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.room:
            raise torch.OutOfMemoryError(f"CUDA out of memory: {len(x)} images")
        return self.inner(x).logits

    def __repr__(self) -> str:
        return "Cut()"


def test_an_evaluation_finds_the_same_in_less_memory() -> None:
    options: dict[str, Any] = {"attacks": ("pgd",), "only": ("robustness", "calibration")}
    options["options"] = {"robustness": {"indicators": False}}
    judge = partial(api.evaluate, dataset=TASK.images("valid"), n_classes=3, registry=REGISTRY)
    records = [judge(Cut(room), eps_px=25.5, **options) for room in (1000, 5)]
    values = [{f.name: f.value for f in record.figures} for record in records]
    assert values[0] == pytest.approx(values[1], abs=TINY)


class Climbed(Cut):
    """One that has room for any number of images of which no slope is asked."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if torch.is_grad_enabled() else self.inner(x).logits


def test_an_attacked_batch_is_taken_again_by_itself() -> None:
    ctx = Context(gen(), Threat("Linf", 25.5), batch_size=8)
    images = []
    for room in (1000, 3):
        subject = pixel_model(Climbed(room).eval().requires_grad_(False))
        images.append(attacked(subject, PGD(steps=2), TASK.images("valid"), ctx).x_adv)
    assert close(*images)


def test_validation_keeps_to_the_micro_batch(tmp_path: Path) -> None:
    trainer = Trainer(recipe("run.micro_batch=5"), RunFolder.create(tmp_path / "a"))
    validator, network = trainer.validator(1), trainer.backbone.model.network
    validator.validate(6)
    validator.draw_grid(tmp_path / "grid.png")
    validator.draw_energies(tmp_path / "energies.svg")
    validator.judge({})
    assert network.largest == 5


def test_a_micro_batch_halved_in_validation_stays_halved_in_the_next(tmp_path: Path) -> None:
    trainer = Trainer(recipe("backbone.network.images=5"), RunFolder.create(tmp_path / "a"))
    trainer.validator(1).validate(6)
    learnt = trainer.parts.micro.size
    assert 0 < learnt <= 5
    trainer.backbone.model.network.largest = 0
    trainer.validator(2).validate(6)
    assert trainer.backbone.model.network.largest <= learnt
    assert trainer.parts.micro.size == learnt


def test_a_run_that_is_sick_where_memory_runs_out_goes_back_before_it_ends(tmp_path: Path) -> None:
    """What its unread metrics tell comes first: a sick step is not what the run is saved as."""
    trainer = Trainer(recipe("sentinel.quiet=1"), RunFolder.create(tmp_path / "a"))
    network = trainer.backbone.model.network

    def full_and_sick() -> bool:
        if trainer.step == 7:
            network.images = 0
            unread = ({"step": 6, "epoch": 2}, ["loss"], torch.tensor([float("nan")]))
            trainer.journal._rows.append(unread)
        return False

    trainer.stop = full_and_sick
    with pytest.raises(OutOfMemory):
        trainer.run()
    assert events(tmp_path / "a", "rollback")
    assert events(tmp_path / "a", "memory")[-1]["ended"]


def test_samples_are_the_same_in_less_memory(tmp_path: Path) -> None:
    trained(tmp_path / "a", "backbone.network.images=20")
    model = export(tmp_path / "a", which="last").folder
    config = model / "config.json"
    drawn = sample(model, registry=GUESTS, n=30, steps=3, device="cpu").pixels
    config.write_text(config.read_text().replace('"images": 20', '"images": 1000'))
    assert close(drawn, sample(model, registry=GUESTS, n=30, steps=3, device="cpu").pixels)
