"""What a step costs does not grow with the length of its chains, and chains pay for no more."""

import pytest
import torch
from states import nodes
from torch import Tensor, nn
from toys import backbone_of, gen, objective_of

from jemkit import MALA, PGD, SGLD, ModelEnergy, SGLDMomentum, SignDescent, run
from jemkit.sampling.kernels import L2Descent
from jemkit.testing import toy_batch, toy_model, toy_task

TASK = toy_task()
BATCH = toy_batch(TASK)


@pytest.mark.parametrize("name", ["jem", "jempp", "mebm", "sadajem"])
@pytest.mark.parametrize("objective", ["jem", "ebjdat"])
def test_the_graph_of_a_loss_does_not_grow_with_the_chain(name: str, objective: str) -> None:
    sizes = []
    for steps in (1, 7):
        backbone = backbone_of(name, steps=steps)
        chosen = objective_of(objective, **({"adv_steps": steps} if objective == "ebjdat" else {}))
        draws = chosen.draw(backbone, BATCH, gen())
        sizes.append(nodes(chosen.loss(backbone, BATCH, draws).total))
    assert sizes[0] == sizes[1] > 10


def counted(model: nn.Module) -> list[int]:
    sizes: list[int] = []
    model.network.register_forward_hook(lambda m, args, out: sizes.append(len(args[0])))
    return sizes


@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize("sampler", [SGLD(), SGLDMomentum(), SignDescent(), L2Descent()])
def test_a_chain_of_m_steps_makes_m_forward_passes(steps: int, sampler: SGLD) -> None:
    model = toy_model(TASK).eval()
    sizes = counted(model)
    run(sampler, ModelEnergy(model), BATCH.x, gen(), steps)
    assert sizes == [len(BATCH.x)] * steps


def test_a_step_of_mala_makes_two_passes_for_each_of_both_ends() -> None:
    model = toy_model(TASK).eval()
    sizes = counted(model)
    run(MALA(), ModelEnergy(model), BATCH.x, gen(), 3)
    assert sizes == [len(BATCH.x)] * 3 * 4


@pytest.mark.parametrize("steps", [0, 3])
def test_an_attack_of_m_steps_makes_m_forward_passes(steps: int) -> None:
    model = toy_model(TASK).eval()
    sizes = counted(model)
    PGD(steps=steps).draw(
        model, lambda x: model(x).energy, BATCH.x, gen(), bounds=TASK.bounds, radius_px=8
    )  # fmt: skip
    assert len(sizes) == steps


def test_pyld_makes_one_pass_of_the_trunk_for_all_its_inner_steps() -> None:
    backbone = backbone_of("jempp", steps=3)
    trunk, stem = [], []
    network = backbone.model.network
    network.conv1.register_forward_hook(lambda *_: trunk.append(1))
    network.first.register_forward_hook(lambda *_: stem.append(1))
    backbone.density.draw(backbone.model, 4, gen())
    assert len(trunk) == 3
    assert len(stem) == 3 * (1 + 5)


class Watched(torch.autograd.Function):
    """The identity of a weight; tells when a gradient comes back to it."""

    gradients: list[int] = []

    @staticmethod
    def forward(ctx: object, w: Tensor) -> Tensor:
        return w.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        Watched.gradients.append(1)
        return grad


class Telling(nn.Module):
    """E(x) = |w x|^2 / 2 through a weight that tells of its gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * (Watched.apply(self.w) * x).square().flatten(1).sum(1)


def test_a_chain_computes_no_gradient_of_a_weight() -> None:
    model = Telling()
    Watched.gradients.clear()
    model(torch.ones(2, 3)).sum().backward()
    assert Watched.gradients  # so that the law below can fail
    model.w.grad = None
    Watched.gradients.clear()
    run(SGLD(), model, torch.ones(2, 3), gen(), 3)  # though nobody has frozen it
    assert not Watched.gradients
    assert model.w.grad is None


def test_negatives_reach_nobody_by_a_backward_pass() -> None:
    backbone, objective = backbone_of("sadajem"), objective_of("ebjdat")
    leaf = BATCH.x.clone().requires_grad_()
    batch = BATCH._replace(x=leaf)
    draws = objective.draw(backbone, batch, gen())
    loss = backbone.density.loss(
        backbone.model(BATCH.x_pos).energy, backbone.model(draws.x_adv).energy
    )
    loss.backward()
    assert leaf.grad is None
    assert backbone.density.buffer.states.grad is None
