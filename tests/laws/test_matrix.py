"""Every backbone with every objective and every updater: steps that repeat, draws that disturb
nothing, losses that may be taken again."""

import pytest
import torch
from toys import (
    BACKBONES,
    MATRIX,
    MISFITS,
    OBJECTIVES,
    QUICK,
    UPDATERS,
    backbone_for,
    backbone_of,
    gen,
    objective_of,
    updater_of,
)

from jemkit import Backbone, Guard, MisfitError, check, train_step
from jemkit.runtime.pytree import same
from jemkit.testing import toy_batch, toy_task
from jemkit.testing.law import plain, state_of

TASK = toy_task()
BATCH = toy_batch(TASK, 6, positives=4)
WHOLE = [
    pytest.param(names, id="-".join(names), marks=() if names in QUICK else pytest.mark.slow)
    for names in MATRIX
]
PAIRS = sorted({(b, o) for b, o, _ in MATRIX})


def after_two_steps(names: tuple[str, str, str]) -> tuple[Backbone, list[dict[str, float]]]:
    backbone, objective = backbone_for(names[1], names[0]), objective_of(names[1])
    check(backbone, objective)
    updater, guard, rng = updater_of(names[2], backbone.model), Guard(), gen(1)
    recorded = []
    for _ in range(2):
        terms = train_step(backbone, objective, updater, BATCH, rng, guard)
        recorded.append({name: float(term.detach()) for name, (_, term) in terms.parts.items()})
    guard.settle()
    return backbone, recorded


@pytest.mark.parametrize("names", WHOLE)
def test_two_steps_repeat_bit_for_bit_and_stay_finite(names: tuple[str, str, str]) -> None:
    began = state_of(backbone_for(names[1], names[0]).model)["tensors"]
    (one, recorded), (other, again) = after_two_steps(names), after_two_steps(names)
    assert same(one.model.state_dict(), other.model.state_dict())
    assert recorded == again
    assert all(t.isfinite().all() for t in one.model.state_dict().values())
    assert all(torch.tensor(v).isfinite() for terms in recorded for v in terms.values())
    assert not same(one.model.state_dict(), began)
    if one.has_density:
        assert same(one.density.state_dict(), other.density.state_dict())


@pytest.mark.parametrize(("backbone", "objective"), PAIRS)
def test_a_draw_leaves_the_model_alone(backbone: str, objective: str) -> None:
    built, chosen = backbone_for(objective, backbone), objective_of(objective)
    first = next(built.model.parameters())
    first.grad = torch.full_like(first, 3.0)
    before, own = state_of(built.model), torch.get_rng_state()
    draws = chosen.draw(built, BATCH, gen())
    assert same(state_of(built.model), before)
    assert torch.equal(torch.get_rng_state(), own)
    assert not any(t.requires_grad for t in plain(draws))
    assert all(t.isfinite().all() for t in plain(draws))


@pytest.mark.parametrize(("backbone", "objective"), PAIRS)
def test_a_loss_can_be_taken_again_and_is_the_sum_of_what_is_logged(
    backbone: str, objective: str
) -> None:
    built, chosen = backbone_for(objective, backbone), objective_of(objective)
    draws = chosen.draw(built, BATCH, gen())
    one, other = (chosen.loss(built, BATCH, draws) for _ in range(2))
    assert torch.equal(one.total, other.total)  # by the batch's statistics, which are the same
    total = sum(weight * float(term.detach()) for weight, term in one.parts.values())
    assert float(one.total.detach()) == pytest.approx(total, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(("backbone", "objective"), MISFITS)
def test_misfits_are_refused_with_what_would_fit(backbone: str, objective: str) -> None:
    with pytest.raises(MisfitError, match=r"has no density; choose a backbone with a density"):
        check(backbone_of(backbone), objective_of(objective))


def test_the_matrix_is_whole() -> None:
    pairs = len(BACKBONES) * len(OBJECTIVES)
    assert len(MATRIX) + len(MISFITS) * len(UPDATERS) == pairs * len(UPDATERS)
    assert {b for b, _ in MISFITS} == {"classifier"}
    for part, names in enumerate((BACKBONES, OBJECTIVES, UPDATERS)):
        assert {taken[part] for taken in QUICK} == set(names)
    assert {o for _, o in MISFITS} == {"jem", "jeat", "ebjdat", "ebjdatreleased", "dat"}
