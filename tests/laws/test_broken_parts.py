"""The laws of each kind of part find one that breaks them, and name the law."""

from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch import Generator, Tensor
from toys import REGISTRY

from jemkit import Augmentation, Images, Options, Terms, Tracker, testing


class Careless(Options):
    """Walks in place, by torch's own generator."""

    needs_stem: ClassVar[bool] = False

    def step(self, energy: Any, x: Tensor, rng: Generator) -> Tensor:
        return x.add_(torch.randn(x.shape))


class Coupled(Options):
    """Moves each row by its neighbours' mean."""

    needs_stem: ClassVar[bool] = False

    def step(self, energy: Any, x: Tensor, rng: Generator) -> Tensor:
        return x - x.mean(dim=0)


class Wasteful(Options):
    """Draws attached images, and leaves a gradient behind."""

    needs_density: ClassVar[bool] = False

    def draw(self, backbone: Any, batch: Any, rng: Generator) -> Tensor:
        scores = backbone.model(batch.x)
        scores.energy.sum().backward(retain_graph=True)
        return batch.x * scores.energy.view(-1, 1, 1, 1)

    def loss(self, backbone: Any, batch: Any, draws: Tensor) -> Terms:
        return Terms.weighted({"E": (1.0, backbone.model(batch.x).energy.mean())})


class Kernel(Options):
    """A sampler whose step gives what a test wants of it."""

    needs_stem: ClassVar[bool] = False
    gives: Any

    def step(self, energy: Any, x: Tensor, rng: Generator) -> Any:
        return self.gives(energy, x)


class Pair(NamedTuple):
    """A kernel's state."""

    x: Tensor
    velocity: Tensor
    info: dict[str, Tensor]


class Rolling(Kernel):
    """A sampler with a momentum, whose step gives what a test wants of it."""

    begins: Any = lambda x: Pair(x, torch.zeros_like(x), {})

    def init(self, x: Tensor, rng: Generator) -> Any:
        return self.begins(x)


def hoarding_step() -> Any:
    """One that remembers its steps beside its state."""
    recorded: list[int] = []

    def step(_: Any, state: Pair) -> Pair:
        recorded.append(1)
        return state._replace(x=state.x + len(recorded))

    return step


def attached_step(energy: Any, x: Tensor) -> Tensor:
    """One that forgets to detach."""
    x = x.detach().requires_grad_()
    return x - 0.1 * torch.autograd.grad(energy(x).sum(), x)[0]


def marking_step(energy: Any, x: Tensor) -> Tensor:
    """One that leaves its mark on the images."""
    (slope,) = torch.autograd.grad(energy(x.requires_grad_()).sum(), x)
    return x.detach() - 0.1 * slope


class Loss(Options):
    """An objective whose loss, or draw, gives what a test wants of it."""

    needs_density: ClassVar[bool] = False
    gives: Any
    drawn: Any = None

    def draw(self, backbone: Any, batch: Any, rng: Generator) -> Any:
        return self.drawn(batch) if self.drawn else None

    def loss(self, backbone: Any, batch: Any, draws: Any) -> Any:
        return self.gives(backbone.model(batch.x).energy.mean())


def backward_loss(energy: Tensor) -> Terms:
    energy.backward(retain_graph=True)
    return Terms.weighted({"E": (1.0, energy)})


def detached_loss(energy: Tensor) -> Terms:
    return Terms.weighted({"E": (1.0, energy.detach())})


def term(energy: Tensor) -> Terms:
    return Terms.weighted({"E": (1.0, energy)})


class Far(Options):
    """A distance whose function gives what a test wants of it."""

    min_size: ClassVar[int] = 1
    gives: Any

    def bind(self, model: Any, x: Tensor, bounds: Any) -> Any:
        return self.gives and (lambda z: self.gives(x, z))


def squares(x: Tensor, z: Tensor) -> Tensor:
    return (x - z).flatten(1).pow(2).sum(1)


class Beginning(Options):
    """A start whose draw gives what a test wants of it."""

    gives: Any

    def build(self, task: Any, device: Any) -> Any:
        return self

    def draw(self, n: int, rng: Generator, y: Any = None) -> Any:
        return self.gives(torch.zeros((n, 1, 8, 8)))


class Opinion(Options):
    """An evaluator that gives what a test wants of it."""

    gives: Any

    def __call__(self, subject: Any, data: Any, ctx: Any) -> Any:
        return self.gives


class Ascent(Options):
    """An attack whose draw gives what a test wants of it."""

    gives: Any

    def draw(self, model: Any, loss: Any, x: Tensor, rng: Any, **given: Any) -> Any:
        return self.gives(x)


class Photographs(Options):
    """A data set that gives what a test wants of it."""

    radius_px: ClassVar[float] = 8.0
    augmentation: ClassVar[Augmentation] = Augmentation()
    n_classes: int = 2
    gives: Any

    class_names: Any = ("no", "yes")
    listed: Any = ["a.png"] * 6

    def load(self, split: str) -> Any:
        return self.gives

    def files(self, split: str) -> Any:
        return self.listed


def pictures(dtype: torch.dtype = torch.uint8, **other: Any) -> Images:
    y = torch.arange(6) % 2
    return Images(torch.zeros((6, 1, 8, 8), dtype=dtype), other.get("y", y))


class Rule(Options):
    """An updater's options that build nothing."""

    def build(self, model: Any, optimizer: Any) -> Any:
        return None


class Reading(Options):
    """An energy model that reads logits alone."""

    def build(self, network: Any, n_classes: int) -> Any:
        head = torch.nn.Linear(network.width, n_classes)
        return torch.nn.Sequential(network, head)


class Follower(Tracker):
    """A tracker whose callbacks do what a test wants of it."""

    def __init__(self, at: str, does: Any) -> None:
        def callback(*given: Any) -> None:
            does(*given)

        setattr(self, at, callback)


class Follow(Options):
    """A tracker's options."""

    at: str = "on_step"
    does: Any = None

    def build(self) -> Any:
        return Follower(self.at, self.does) if self.does else self.does


def overwriting(run: Any) -> None:
    (run.folder / "metrics.csv").write_text("")


def nothing(*_: Any) -> None:
    return None


BROKEN = [
    (testing.check_sampler, Careless(), "generator"),
    (testing.check_sampler, Coupled(), "each row by itself"),
    (testing.check_sampler, Kernel(gives=attached_step), "detached and carries no graph"),
    (
        testing.check_sampler,
        Kernel(gives=marking_step),
        "`requires_grad` and `.grad` of the images",
    ),
    (testing.check_sampler, Kernel(gives=nothing), "is a tensor .*; it gave None"),
    (testing.check_sampler, Kernel(gives=lambda e, x: x[:1]), r"shape .*it gave a tensor \[1, 1"),
    (testing.check_sampler, Kernel(gives=lambda e, x: x.double()), "float32; .* of float64"),
    (testing.check_sampler, Kernel(gives=lambda e, x: x * float("nan")), "is finite"),
    (testing.check_sampler, Rolling(gives=nothing, begins=lambda x: (x,)), "a named tuple whose"),
    (testing.check_sampler, Rolling(gives=lambda e, s: s.x), "a state as `init` does; .* a tensor"),
    (
        testing.check_sampler,
        Rolling(gives=lambda e, s: s._replace(velocity=s.x.log())),
        "finite tensors .*, velocity too",
    ),
    (
        testing.check_sampler,
        Rolling(gives=lambda e, s: s._replace(info={"pace": s.x})),
        r"pace as a number for each row, .*; it gave a tensor \[6, 1",
    ),
    (
        testing.check_sampler,
        Rolling(gives=lambda e, s: s._replace(velocity=s.velocity.add_(1))),
        "leaves the state that it is given",
    ),
    (testing.check_sampler, Rolling(gives=hoarding_step()), "give one next state"),
    (testing.check_objective, Wasteful(), "alone"),
    (testing.check_objective, Loss(gives=backward_loss), "`.grad`, which only an updater fills"),
    (testing.check_objective, Loss(gives=nothing), "gives Terms.*it gave None"),
    (testing.check_objective, Loss(gives=lambda energy: energy), "gives Terms.*it gave a tensor"),
    (testing.check_objective, Loss(gives=detached_loss), "is attached to its inputs' graph"),
    (
        testing.check_objective,
        Loss(gives=lambda energy: term(energy * float("nan"))),
        "the term 'E' is finite",
    ),
    (
        testing.check_objective,
        Loss(gives=term, drawn=lambda batch: batch.x * float("nan")),
        "what it draws is finite",
    ),
    (testing.check_distance, Far(gives=None), "gives a function of x~; it gave None"),
    (testing.check_distance, Far(gives=nothing), "is a tensor .*; it gave None"),
    (testing.check_distance, Far(gives=lambda x, z: squares(x, z).sum()), "has the shape"),
    (testing.check_distance, Far(gives=lambda x, z: squares(x, z.detach())), "a detached copy"),
    (
        testing.check_distance,
        Far(gives=lambda x, z: squares(x, z) + 0 * z.detach().mul_(1.1).sum()),
        "alone",
    ),
    (testing.check_start, Beginning(gives=nothing), "is a tensor .*; it gave None"),
    (testing.check_start, Beginning(gives=lambda x: x + float("nan")), "is finite"),
    (testing.check_start, Beginning(gives=lambda x: x.half()), "it gave a tensor .* of float16"),
    (testing.check_evaluator, Opinion(gives=None), "gives a list of Figure; it gave None"),
    (testing.check_evaluator, Opinion(gives=[0.5]), "gives a list of Figure; it gave a float"),
    (testing.check_attack, Ascent(gives=nothing), "is a tensor .*; it gave None"),
    (testing.check_attack, Ascent(gives=lambda x: x.clone().requires_grad_()), "detached"),
    (testing.check_dataset, Photographs(gives=None, class_names=("no",)), "string for each class"),
    (testing.check_dataset, Photographs(gives=pictures(), listed=["a.png"]), "for each image"),
    (testing.check_dataset, Photographs(gives=None), "gives Images.*it gave None"),
    (testing.check_dataset, Photographs(gives=pictures(torch.float64)), "uint8, or float32"),
    (testing.check_dataset, Photographs(gives=pictures(y=torch.arange(6))), "from 0 to 1"),
    (testing.check_dataset, Photographs(gives=pictures(y=torch.zeros(6))), "int64"),
    (testing.check_updater, Rule(), "builds what has `step`; it gave None"),
    (testing.check_energy_model, Reading(), "gives Scores.*it gave a tensor"),
    (testing.check_tracker, Follow(), "`build` gives a Tracker; it gave None"),
    (
        testing.check_tracker,
        Follow(at="on_steps", does=nothing),
        "did you mean 'on_step'",
    ),
    (testing.check_tracker, Follow(does=lambda step, row: row.clear()), "leaves its arguments"),
    (testing.check_tracker, Follow(does=lambda *_: torch.rand(1)), "torch's global generator"),
    (testing.check_tracker, Follow(does=lambda *_: torch.set_grad_enabled(False)), "switches"),
    (testing.check_tracker, Follow(at="on_begin", does=overwriting), "leaves the run's config"),
]


@pytest.mark.parametrize(("check", "part", "law"), BROKEN)
def test_a_part_that_breaks_a_law_is_refused_with_that_law(check: Any, part: Any, law: str) -> None:
    # some leave torch's switches changed
    with torch.enable_grad(), pytest.raises(testing.ConformanceError, match=law):
        check(part)


def test_a_data_set_keeps_the_laws_of_its_kind() -> None:
    testing.check_dataset(REGISTRY["dataset"]["digits"]())
    testing.check_dataset(Photographs(gives=pictures()))
