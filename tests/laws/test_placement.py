"""Whatever a run or an evaluation makes, it makes on the device of its model: see `elsewhere`."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from elsewhere import DEVICE, Far, FarGenerator, elsewhere, moved
from torch import Tensor
from toys import (
    MATRIX,
    QUICK,
    REGISTRY,
    backbone_for,
    gen,
    objective_of,
    toy_recipe,
    toy_registry,
    updater_of,
)

from jemkit import MALA, Backbone, Batch, Guard, Trainer, train_step
from jemkit.attacks.base import Threat
from jemkit.attacks.pixel_model import PixelModel
from jemkit.data import Images
from jemkit.metrics.energy_gap import Robustness
from jemkit.metrics.evaluator import Context, measure
from jemkit.runtime.run_dir import RunFolder
from jemkit.sampling.density import Buffer
from jemkit.testing import toy_batch, toy_task

TASK = toy_task()


class Unread(Guard):
    """A guard that lets everything through, so that what waits is the step's own."""

    def settle(self) -> None:
        pass


def rng(seed: int = 1) -> FarGenerator:
    return FarGenerator(DEVICE).manual_seed(seed)  # type: ignore[return-value]


def far_batch() -> Batch:
    batch = toy_batch(TASK, 6, positives=4)
    return batch._replace(
        x=Far(batch.x), y=Far(batch.y), x_pos=Far(batch.x_pos), index=Far(batch.index)
    )


def far_backbone(name: str, objective: str = "ebjdat", **options: Any) -> Backbone:
    """Built on the CPU, its buffer filled and its start made there, and moved."""
    built = backbone_for(objective, name, **options)
    if built.has_density:
        built.density.sample(built.model, 3, gen(), steps=1, start=built.density.start)
        built.density.draw(built.model, 3, gen())
    far: Backbone = moved(built)
    return far


MISPLACED = [
    lambda x: x + torch.ones(3),
    lambda x: torch.where(x > 0, x, torch.zeros(3)),
    lambda x: torch.cat([x, torch.zeros(3)]),
    lambda x: x.copy_(x).lerp_(torch.zeros(3), 0.5),
    lambda x: torch._foreach_add_([x], [torch.ones(3)]),
    lambda x: torch.rand(3, generator=rng()),
    lambda x: torch.rand(3, generator=gen(), device=x.device),
    lambda x: x.normal_(generator=gen()),
]


@pytest.mark.parametrize("work", MISPLACED)
def test_what_a_gpu_refuses_is_refused(work: Any) -> None:
    x = Far(torch.ones(3))
    with elsewhere(), pytest.raises(RuntimeError, match=r"of the CPU|generator of"):
        work(x)


WAITING = [
    lambda x: float(x.sum()),
    lambda x: bool(x.any()),
    lambda x: x.cpu(),
    lambda x: x.tolist(),
    lambda x: x[x > 0],
    lambda x: x.nonzero(),
    lambda x: x[torch.tensor([0, 1])],
    lambda x: torch.equal(x, x),
]


@pytest.mark.parametrize("work", WAITING)
def test_what_a_host_waits_for_is_counted(work: Any) -> None:
    x = Far(torch.ones(3))
    with elsewhere() as mode:
        work(x)
    assert sum(mode.waits.values()) == 1


def test_a_device_of_pretence_computes_what_the_cpu_does() -> None:
    x = torch.arange(6.0).view(2, 3)
    with elsewhere() as mode:
        far = torch.rand((2, 3), generator=rng(), device=DEVICE) + Far(x)[:, 1:].mean() * 2.0
        far[0, 1:] = torch.zeros((), device=DEVICE)
        assert far.device == DEVICE
    near = torch.rand((2, 3), generator=gen(1)) + x[:, 1:].mean() * 2.0
    near[0, 1:] = 0
    assert torch.equal(far.values, near)  # type: ignore[attr-defined]
    assert not mode.waits


WHOLE = [
    pytest.param(names, id="-".join(names), marks=() if names in QUICK else pytest.mark.slow)
    for names in MATRIX
]


@pytest.mark.parametrize("names", WHOLE)
def test_a_step_stays_on_its_device_and_waits_for_nothing(names: tuple[str, str, str]) -> None:
    backbone, objective = far_backbone(*names[:2]), moved(objective_of(names[1]))
    updater = updater_of(names[2], backbone.model)
    with elsewhere() as mode:
        for _ in range(2):
            terms = train_step(backbone, objective, updater, far_batch(), rng(), Unread())
    assert isinstance(terms.total, Far)
    assert terms.total.values.isfinite()
    if names[1] == "dat":  # how long its chains are depends on an AUC, which is read on the host
        assert dict(mode.waits) == {"aten._local_scalar_dense": 2}
    else:
        assert not mode.waits


STARTS = ["blurred", "gaussian", "mixture", "noise", "pca", "shuffled", "uniform"]


CHAINS = [
    pytest.param(s, start, marks=() if s == "sgld" or start == "mixture" else pytest.mark.slow)
    for start in STARTS
    for s in sorted(REGISTRY["sampler"])
]


@pytest.mark.parametrize(("sampler", "start"), CHAINS)
def test_chains_stay_on_their_device_and_wait_for_nothing(sampler: str, start: str) -> None:
    chosen = {"sampler": REGISTRY["sampler"][sampler](), "start": REGISTRY["start"][start]()}
    chosen["buffer"] = Buffer(capacity=300, conditional=True)
    backbone = far_backbone("jem", **chosen)
    density, model = backbone.density, backbone.model
    with elsewhere() as mode:
        y = Far(torch.arange(4) % TASK.n_classes)
        made = [density.draw(model, 40, rng()), density.draw(model, 4, rng(), y)]
        made.append(density.sample(model, 4, rng(), steps=2, start=density.start, y=y))
    assert all(isinstance(x, Far) for x in made)
    assert not mode.waits


def test_what_a_kernel_reports_stays_on_its_device() -> None:
    backbone, objective = far_backbone("jem", sampler=MALA()), objective_of("jem")
    updater = updater_of("plain", backbone.model)
    with elsewhere() as mode:
        terms = train_step(backbone, objective, updater, far_batch(), rng(), Unread())
    assert isinstance(terms.watched["sampler/acceptance"], Far)
    assert not mode.waits


@pytest.mark.parametrize("distance", ["l2", "logits", "none"])
def test_distances_stay_on_their_device(distance: str) -> None:
    backbone = far_backbone("jem")
    with elsewhere() as mode:
        x = far_batch().x
        d = REGISTRY["distance"][distance]().bind(backbone.model, x, TASK.bounds)
        assert isinstance(d(x * 0.9), Far)
    assert not mode.waits


def far_context(attack: str = "pgd", **options: Any) -> Context:
    known = REGISTRY["attack"][attack]
    fast = {"steps": 3, "queries": 3, "restarts": 1, **options}
    chosen = known(**{k: v for k, v in fast.items() if k in known.model_fields})
    return Context(
        rng(), Threat("Linf", 40), attacks={attack: chosen}, quick=True, batch_size=20,
        images=TASK.images,
    )  # fmt: skip


def far_subject(objective: str = "ebjdat") -> PixelModel:
    backbone = far_backbone("jem", objective)
    return PixelModel(backbone.model.eval(), TASK.bounds, backbone.density)


def data() -> Images:
    """On the host, as every data set is."""
    return TASK.images("train").take(torch.arange(24))


ATTACKS = sorted({*REGISTRY["attack"]} - {"aa", "bpda"})  # minutes; for a refined input alone


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_stay_on_their_device(attack: str) -> None:
    subject = far_subject()
    with elsewhere():
        figures = measure(
            subject, data(), [Robustness(attack=far_context(attack).attacks[attack])],
            far_context(attack),
        )  # fmt: skip
    assert 0 <= figures[0].value <= 1


SMALL = {"steps": 2, "n": 16, "indicators": False, "path_images": 4}


@pytest.mark.parametrize("name", sorted(REGISTRY["evaluator"]))
def test_evaluators_stay_on_their_device(name: str) -> None:
    known = REGISTRY["evaluator"][name]
    evaluator = known(**{k: v for k, v in SMALL.items() if k in known.model_fields})
    subject = far_subject("ducat" if name == "foldings" else "ebjdat")
    with elsewhere():
        assert measure(subject, data(), [evaluator], far_context())


def far_run(path: Path, backbone: str, updater: str, *given: str) -> Trainer:
    """A run of EB-JDAT on the device, which no recipe can name."""
    chosen = toy_recipe(toy_registry(), backbone, "ebjdat", updater, "run.ema_decay=0.9", *given)
    run = chosen.recipe.run.model_copy(update={"device": DEVICE.type})
    recipe = chosen.recipe.model_copy(update={"run": run})
    return Trainer(chosen._replace(recipe=recipe), RunFolder.create(path / "run"))


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")  # the values do move
def test_a_run_stays_on_its_device_from_its_start_to_its_judgement(tmp_path: Path) -> None:
    """With validation, samples, checkpoints and an average of the weights."""
    with elsewhere():
        trainer = far_run(tmp_path, "sadajem", "sam", "run.epochs=1")
        trainer.run()
        summary = trainer.finish()
        state: dict[str, Tensor] = trainer.backbone.model.state_dict()
        assert all(isinstance(t, Far) for t in state.values())
    assert 0 <= summary.value("clean") <= 1
    assert summary.figures[0].protocol["device"] == DEVICE.type


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")
def test_between_two_readings_a_run_waits_for_its_guard_alone(tmp_path: Path) -> None:
    """Which on a GPU is a step late."""
    with elsewhere() as mode:
        trainer = far_run(tmp_path, "jem", "plain")
        trainer.one_step()
        trainer.gather()
        trainer.journal._gathered = math.inf  # no reading for its age
        before = mode.waits.copy()
        for _ in range(3):
            trainer.one_step()
    assert mode.waits - before == {"aten._local_scalar_dense": 3}


def test_a_perturbation_of_a_checkpoint_is_brought_to_the_images() -> None:
    """A checkpoint holds TDAT's on the CPU."""
    backbone, objective = far_backbone("classifier", "tdat"), objective_of("tdat")
    objective.load_state_dict({"m": torch.zeros(far_batch().x.shape)})
    with elsewhere():
        draws = objective.draw(backbone, far_batch(), rng())
    assert isinstance(draws.m, Far)
