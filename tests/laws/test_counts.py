"""What a step may cost, in counts that no machine changes: passes, waits, allocations, compiles."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from states import nodes
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from toys import REGISTRY, backbone_for, backbone_of, gen, objective_of, updater_of

from jemkit import (
    MALA,
    PGD,
    PYLD,
    SGLD,
    Guard,
    ModelEnergy,
    SGLDMomentum,
    SignDescent,
    run,
    train_step,
)  # fmt: skip
from jemkit.data import Augmentation, Images, Loader, Views
from jemkit.models.networks import SmallCNN
from jemkit.runtime.modes import frozen
from jemkit.sampling.density import Buffer
from jemkit.sampling.init_dists import Uniform
from jemkit.sampling.kernels import Boxed, L2Descent, Projected, Sampler
from jemkit.testing import toy_batch, toy_model, toy_task

TASK = toy_task()
B, P, M, M_ADV = 6, 3, 4, 5
BATCH = toy_batch(TASK, B, P)
NORMS = ("none", "batch")


class Count(NamedTuple):
    """Passes of the network, and images in them."""

    passes: int
    images: int

    def __add__(self, other: Any) -> "Count":
        return Count(self.passes + other.passes, self.images + other.images)

    def times(self, n: int) -> "Count":
        return Count(n * self.passes, n * self.images)


def update(norm: str, *streams: int) -> Count:
    """All streams in one pass; with batch norm one pass each, by statistics of its own."""
    return Count(1 if norm == "none" else len(streams), sum(streams))


def wanted(objective: str, norm: str) -> tuple[Count, Count]:
    """What the algorithms ask for: the chains of a step, and one taking of the loss.

    M passes of P images are the chains to x^-, M_adv of B those to x~. x~ begins without a pass,
    but where it goes away from the clean prediction: in TRADES, and in EB-JDAT's released program,
    whose distance passes x~ once more a step.
    """
    negatives, adversaries = Count(M, M * P), Count(M_ADV, M_ADV * B)
    four = update(norm, B, P, P, B)
    table = {
        "ce": (Count(0, 0), update(norm, B)),
        "jem": (negatives, update(norm, B, P, P)),
        "pgdat": (adversaries, update(norm, B)),
        "trades": (adversaries + Count(1, B), update(norm, B, B)),
        "mart": (adversaries, update(norm, B, B)),
        "weat": (adversaries + Count(1, B), update(norm, B, B)),
        "score": (adversaries + Count(1, B), update(norm, B, B)),
        "ducat": (adversaries, update(norm, B)),  # before its dummies begin
        "lbgat": (adversaries + Count(1, B), update(norm, B, B)),  # beside the teacher's
        "dat": (Count(2, 2 * P) + adversaries, update(norm, P, P, B)),  # the AUC; T is 0 at first
        "tdat": (Count(1, B), update(norm, B, B)),  # one step, not M_adv
        "jeat": (negatives + adversaries, update(norm, B, P)),
        "ebjdat": (negatives + adversaries, four),
        "ebjdatreleased": (negatives + adversaries.times(2) + Count(1, B), four),
    }
    return table[objective]


def options(objective: str) -> dict[str, Any]:
    known = REGISTRY["objective"][objective].model_fields
    given: dict[str, Any] = {"adv_steps": M_ADV, "attack": PGD(steps=M_ADV), "window": 1000}
    return {name: value for name, value in given.items() if name in known}


def counted(model: nn.Module) -> list[int]:
    """The images of each pass of the trunk, which every sampler has to make."""
    recorded: list[int] = []
    conv = model.network.conv1
    conv.register_forward_hook(lambda m, args, out: recorded.append(len(args[0])))
    return recorded


BUILT = [
    (b, o)
    for b in ("classifier", "jem", "jempp", "mebm", "sadajem")
    for o in ("ce", "pgdat", "trades", "jem", "ebjdat", "ebjdatreleased")
    if b != "classifier" or o not in ("jem", "ebjdat", "ebjdatreleased")
] + [
    ("sadajem", "jeat"),
    ("dat", "dat"),
    *(("classifier", o) for o in ("mart", "weat", "score", "tdat", "lbgat", "ducat")),
]


UPDATERS = ["plain", "sam", "awp"]
STEPS = [  # quick: every pair with every norm, and an updater by turns
    pytest.param(*pair, norm, updater, marks=() if (i + j) % 3 == k else pytest.mark.slow)
    for i, pair in enumerate(BUILT)
    for j, norm in enumerate(NORMS)
    for k, updater in enumerate(UPDATERS)
]


@pytest.mark.parametrize(("backbone", "objective", "norm", "updater"), STEPS)
def test_a_step_makes_the_passes_of_its_algorithm_and_no_more(
    backbone: str, objective: str, norm: str, updater: str
) -> None:
    density = {} if backbone == "classifier" else {"steps": M}
    built = backbone_for(objective, backbone, network=SmallCNN(channels=2, norm=norm), **density)
    recorded = counted(built.model)
    chosen = objective_of(objective, **options(objective))
    step = updater_of(updater, built.model)
    train_step(built, chosen, step, BATCH, gen(), Guard())
    draw, loss = wanted(objective, norm)
    takings = 1 if updater == "plain" else 2
    assert Count(len(recorded), sum(recorded)) == draw + loss.times(takings)


@pytest.mark.parametrize("theta_steps", [1, 3])
def test_more_updates_draw_no_more_chains(theta_steps: int) -> None:
    built = backbone_of("sadajem", steps=M, network=SmallCNN(channels=2))
    recorded = counted(built.model)
    chosen = objective_of("ebjdat", adv_steps=M_ADV)
    step = updater_of("plain", built.model)
    train_step(built, chosen, step, BATCH, gen(), Guard(), theta_steps)
    draw, loss = wanted("ebjdat", "none")
    assert Count(len(recorded), sum(recorded)) == draw + loss.times(theta_steps)


WAITS = {
    "aten._local_scalar_dense", "aten.item", "aten.nonzero", "aten.is_nonzero", "aten.equal",
    "aten._unique2", "aten.masked_select",
}  # fmt: skip
"""What a host cannot answer before the device has."""


class Watch(TorchDispatchMode):
    """Counts the operations inside, and keeps a weak eye on all they make."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.made: list[StorageWeakRef] = []
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls[str(func._overloadpacket)] += 1
        given = {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))}
        for t in tensors(out):
            storage = t.untyped_storage()
            if storage.data_ptr() not in given:
                self.bytes += storage.nbytes()
                self.made.append(StorageWeakRef(storage))
        return out

    @property
    def waits(self) -> Counter[str]:
        return Counter({name: n for name, n in self.calls.items() if name in WAITS})

    @property
    def alive(self) -> int:
        return sum(not made.expired() for made in self.made)


def tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_flatten(tree)[0] if isinstance(t, Tensor)]


def test_a_wait_is_counted() -> None:
    with Watch() as watch:
        float(torch.ones(2).sum())
        torch.ones(2).nonzero()
        bool(torch.ones(()))
    assert sum(watch.waits.values()) == 3


@pytest.mark.parametrize(
    ("backbone", "objective"),
    [(b, o) for b, o in BUILT if o == "ebjdat" or b == ("sadajem" if o == "jem" else "classifier")],
)
@pytest.mark.parametrize("updater", ["plain", "sam"])
def test_a_step_waits_once_an_update_for_the_guard_alone(
    backbone: str, objective: str, updater: str
) -> None:
    """On the CPU, where nothing is waited for, the guard reads its flag at once."""
    density = {} if backbone == "classifier" else {"steps": M, "start": Uniform()}
    built = backbone_for(objective, backbone, **density)
    chosen = objective_of(objective, **options(objective))
    with Watch() as drawn:
        draws = chosen.draw(built, BATCH, gen())
    with Watch() as lost:
        chosen.loss(built, BATCH, draws)
    step = updater_of(updater, built.model)
    with Watch() as whole:
        train_step(built, chosen, step, BATCH, gen(), Guard())
    assert not drawn.waits
    assert not lost.waits
    assert whole.waits == Counter({"aten._local_scalar_dense": 1})


@pytest.mark.parametrize("views", [Views(), Views(noise_pos=0.1, pos_share=0.5)])
def test_a_batch_takes_as_many_operations_however_many_images_it_has(views: Views) -> None:
    """Crops and mirror images are one gather, and nothing of them waits for the device."""
    augmentation = Augmentation(pad=1, flip=True)
    recorded = []
    for size in (4, 40):
        images = Images(torch.zeros(60, 3, 8, 8, dtype=torch.uint8), torch.zeros(60).long())
        loader = Loader(
            images, size, gen(), views=views, bounds=TASK.bounds, augmentation=augmentation
        )
        loader.batch()
        loader.step = 0
        with Watch() as watch:
            loader.batch()
        assert not watch.waits
        recorded.append(watch.calls)
    assert recorded[0] == recorded[1]


KERNELS: list[Sampler] = [
    SGLD(), SGLD(noise=0.0, clip=1.0), PYLD(), SignDescent(), L2Descent(),
    SGLDMomentum(), MALA(step_size=0.1, temperature=1.0),
    Boxed(SGLD(), TASK.bounds), Boxed(SGLDMomentum(), TASK.bounds),
    Projected(SignDescent(), BATCH.x, 0.1, TASK.bounds),
    Projected(L2Descent(), BATCH.x, 0.1, TASK.bounds, "L2"),
]  # fmt: skip


def name_of(kernel: Any) -> str:
    inner = [name_of(kernel.inner)] if hasattr(kernel, "inner") else []
    return "-".join([type(kernel).__name__, *inner])


def watched_chain(kernel: Sampler, steps: int) -> tuple[Watch, int]:
    """What a chain of so many steps calls and makes, and what of it is left."""
    model = toy_model(TASK, SmallCNN(channels=2)).eval()
    with frozen(model), Watch() as watch:
        x = run(kernel, ModelEnergy(model), BATCH.x, gen(), steps)
    assert x is not None
    return watch, watch.alive


@pytest.mark.parametrize("kernel", KERNELS, ids=name_of)
def test_every_step_of_a_chain_costs_the_same(kernel: Sampler) -> None:
    one, two, four = (watched_chain(kernel, steps)[0] for steps in (1, 2, 4))
    assert four.bytes - two.bytes == 2 * (two.bytes - one.bytes)
    assert len(four.made) - len(two.made) == 2 * (len(two.made) - len(one.made))
    assert four.calls.total() - two.calls.total() == 2 * (two.calls.total() - one.calls.total())


@pytest.mark.parametrize("kernel", KERNELS, ids=name_of)
def test_a_chain_leaves_its_last_state_and_nothing_else(kernel: Sampler) -> None:
    left = [watched_chain(kernel, steps)[1] for steps in (1, 5)]
    assert left == [1, 1]


def beside(kernel: Sampler) -> tuple[Watch, Watch]:
    """A bare gradient to the images, and a step of the kernel."""
    model = toy_model(TASK, SmallCNN(channels=2)).eval()
    x = BATCH.x.detach().requires_grad_()
    with frozen(model), Watch() as bare:
        torch.autograd.grad(model(x).energy.sum(), x)
    with frozen(model), Watch() as step:
        kernel.step(ModelEnergy(model), BATCH.x, gen())
    return bare, step


OVERHEAD = {"SGLD": 5, "SignDescent": 3, "L2Descent": 9}
"""Operations of a step that are not the energy's gradient: detach, scale, subtract, noise."""


@pytest.mark.parametrize("kernel", [SGLD(), SignDescent(), L2Descent()], ids=name_of)
def test_a_kernel_adds_a_handful_of_operations_to_a_gradient(kernel: Sampler) -> None:
    bare, step = beside(kernel)
    added = {k: v for k, v in (step.calls - bare.calls).items() if k != "aten.detach"}
    assert sum(added.values()) <= OVERHEAD[type(kernel).__name__], added


SPARE = {"SGLD": 5, "SignDescent": 3, "L2Descent": 5}
"""Tensors the size of the images that a step makes beside the energy's gradient."""


@pytest.mark.parametrize("kernel", [SGLD(), SignDescent(), L2Descent()], ids=name_of)
def test_a_kernel_allocates_a_handful_of_images_beside_a_gradient(kernel: Sampler) -> None:
    bare, step = beside(kernel)
    rows = 64 * len(BATCH.x)  # norms and masks, a number a row
    images = SPARE[type(kernel).__name__] * BATCH.x.nbytes
    assert step.bytes - bare.bytes <= images + rows


@pytest.mark.parametrize("norm", NORMS)
def test_an_update_allocates_as_much_however_long_its_chains_were(norm: str) -> None:
    made = set()
    for steps in (1, 9):
        built = backbone_of("sadajem", steps=steps, network=SmallCNN(channels=2, norm=norm))
        chosen = objective_of("ebjdat", adv_steps=steps)
        draws = chosen.draw(built, BATCH, gen())
        with Watch() as watch:
            chosen.loss(built, BATCH, draws).total.backward()
        made.add((watch.bytes, len(watch.made)))
    assert len(made) == 1


@pytest.mark.parametrize("backbone", ["jem", "jempp", "mebm", "sadajem"])
def test_steps_after_the_second_cost_what_the_second_did(backbone: str) -> None:
    """Operations, bytes and waits of whole steps; the first makes the optimizer's momenta."""
    built = backbone_of(backbone, steps=M, start=Uniform(), buffer=Buffer(capacity=300, restart=0))
    chosen, guard = objective_of("ebjdat", adv_steps=M_ADV), Guard()
    step, rng, recorded = updater_of("sam", built.model), gen(), []
    for _ in range(4):
        with Watch() as watch:
            train_step(built, chosen, step, BATCH, rng, guard)
        recorded.append((watch.calls, watch.bytes, watch.waits))
    assert recorded[1] == recorded[2] == recorded[3]


def test_frozen_weights_get_no_gradient_computed() -> None:
    """Half of a backward pass: no convolution's backward is asked for its weight."""
    built = backbone_of("sadajem", steps=M, network=SmallCNN(channels=2))
    masks: list[list[bool]] = []

    class Masks(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
        ) -> Any:
            if func is torch.ops.aten.convolution_backward.default:
                masks.append(list(args[-1]))
            return func(*args, **(kwargs or {}))

    with Masks():
        objective_of("ebjdat", adv_steps=M_ADV).draw(built, BATCH, gen())
    assert len(masks) == 3 * (M + M_ADV)
    assert all(mask == [True, False, False] for mask in masks)


@pytest.mark.parametrize("norm", NORMS)
def test_the_graph_of_an_update_does_not_know_how_long_its_chains_were(norm: str) -> None:
    sizes = set()
    for steps in (1, 9):
        built = backbone_of("sadajem", steps=steps, network=SmallCNN(channels=2, norm=norm))
        chosen = objective_of("ebjdat", adv_steps=steps)
        sizes.add(nodes(chosen.loss(built, BATCH, chosen.draw(built, BATCH, gen())).total))
    assert len(sizes) == 1
