"""TDAT: the loss worked by hand, the schedule of its labels, and the perturbation that it keeps."""

from contextlib import suppress
from dataclasses import replace
from math import log, tan, tanh
from pathlib import Path

import pytest
import torch
from groups import different
from logits import batch_of, identity_backbone, logits
from ranks import every_rank
from toys import backbone_of, gen, tiny, toy_recipe, toy_registry

from jemkit import Guard, Plain, Preempted, Terms, train, train_step
from jemkit.runtime.checkpoint import load
from jemkit.testing import toy_batch, toy_task
from jemkit_plugins.tdat import TDAT, Draws, TDATObjective

TASK = toy_task()
CLEAN, ADV = logits((0.5, 0.3, 0.2)), logits((0.2, 0.6, 0.2))


def built(**options: object) -> TDATObjective:
    result: TDATObjective = tiny("objective", "tdat", **options).build(TASK, gen())
    return result


def loss(objective: TDATObjective, m: float = 0.0) -> Terms:
    shift = torch.tensor([[m, 0.0, 0.0]])
    batch = batch_of(CLEAN - shift, 0)  # so that x + m has the probabilities of CLEAN
    return objective.loss(identity_backbone(3), batch, Draws(shift, ADV))


def test_the_loss_worked_by_hand() -> None:
    terms = loss(built(), m=0.7)
    gamma = 0.6 * tan(1)
    smooth = sum(
        -(gamma * (k == 0) + (1 - gamma) / 3) * log(q) for k, q in enumerate((0.2, 0.6, 0.2))
    )
    far = log(0.5 / 0.2) ** 2 + log(0.3 / 0.6) ** 2
    assert float(terms.parts["p(y|x~)"][1].detach()) == pytest.approx(smooth, rel=1e-5)
    assert float(terms.parts["regulariser"][1].detach()) == pytest.approx(far * tanh(0.5), rel=1e-5)
    assert terms.parts["regulariser"][0] == 0.6


def test_the_papers_regulariser_is_of_clean_images_by_the_norm() -> None:
    objective = built(variant="paper")
    batch = batch_of(CLEAN, 0)
    far = (log(0.5 / 0.2) ** 2 + log(0.3 / 0.6) ** 2) ** 0.5
    for m in (0.0, 5.0):
        draws = Draws(torch.tensor([[m, 0.0, 0.0]]), ADV)
        terms = objective.loss(identity_backbone(3), batch, draws).parts["regulariser"][1]
        assert float(terms.detach()) == pytest.approx(far * tanh(0.5), rel=1e-5)


@pytest.mark.parametrize(("variant", "first"), [("released", 0.934), ("paper", 0.457)])
def test_the_weight_of_the_true_label_falls_to_its_least(variant: str, first: float) -> None:
    objective = built(variant=variant)
    total = TASK.total_steps
    assert objective.gamma(0) == pytest.approx(first, abs=1e-3)
    gammas = [objective.gamma(step) for step in range(total)]
    assert gammas == sorted(gammas, reverse=True)
    assert gammas[-1] == 0.15


def test_the_released_schedule_reaches_its_least_after_three_quarters_of_the_run() -> None:
    objective = TDATObjective(TDAT(), replace(TASK, total_steps=1000))
    assert objective.gamma(754) > 0.15 == objective.gamma(756)


def test_labels_of_the_attack_sum_to_one_and_are_not_those_of_the_loss() -> None:
    objective, batch = built(), toy_batch(TASK)
    label, gamma = objective.relaxed(batch), objective.gamma(0)
    torch.testing.assert_close(label.sum(1), torch.ones(6))
    torch.testing.assert_close(
        label.gather(1, batch.y[:, None]).squeeze(1), torch.full((6,), gamma)
    )
    smoothed = gamma + (1 - gamma) / 3  # what the label-smoothed cross-entropy gives to y
    assert smoothed > gamma


def test_a_step_starts_at_a_corner_goes_one_radius_and_stays_in_the_ball() -> None:
    backbone, objective, batch = backbone_of("classifier", TASK), built(), toy_batch(TASK)
    eps = TASK.bounds.px(TASK.radius_px)
    draws = objective.draw(backbone, batch, gen())
    torch.testing.assert_close(draws.m.abs(), torch.full_like(batch.x, eps))
    delta = draws.x_adv - batch.x
    assert float(delta.abs().max()) <= eps + 1e-6
    assert float(draws.x_adv.min()) >= -1
    assert float(draws.x_adv.max()) <= 1


def test_it_keeps_where_a_step_ended_and_begins_there_and_momentum_is_the_papers() -> None:
    for variant, share in (("released", 1.0), ("paper", 0.25)):
        backbone, objective, batch = (
            backbone_of("classifier", TASK),
            built(variant=variant),
            toy_batch(TASK),
        )
        draws = objective.draw(backbone, batch, gen())
        assert objective.m is None  # a step that fails has kept nothing
        objective.after(backbone, batch, draws, gen())
        ended = share * (draws.x_adv - batch.x) + (1 - share) * draws.m
        torch.testing.assert_close(objective.draw(backbone, batch, gen(9)).m, ended)


def test_one_gradient_a_step() -> None:
    backbone, objective, batch = backbone_of("classifier", TASK), built(), toy_batch(TASK)
    recorded: list[int] = []
    backbone.model.network.register_forward_hook(lambda m, args, out: recorded.append(len(args[0])))
    updater = Plain().build(backbone.model, torch.optim.SGD(backbone.model.parameters(), lr=0.1))
    train_step(backbone, objective, updater, batch, gen(), Guard())
    assert recorded == [6, 6, 6]  # the climb; x + m and x~


def test_its_state_is_the_perturbation() -> None:
    backbone, objective, batch = backbone_of("classifier", TASK), built(), toy_batch(TASK)
    objective.after(backbone, batch, objective.draw(backbone, batch, gen()), gen())
    other = built()
    other.load_state_dict(objective.state_dict())
    one, two = (o.draw(backbone, batch, gen(3)) for o in (objective, other))
    assert torch.equal(one.x_adv, two.x_adv)
    smaller = objective.draw(backbone, toy_batch(TASK, 4), gen())
    assert smaller.m.shape[0] == 4


def test_without_the_regulariser_one_stream_passes() -> None:
    objective = built(weight=0)
    assert objective.streams == ("x_adv",)
    assert list(loss(objective).parts) == ["p(y|x~)"]


def runs(folder: str) -> None:
    """A whole run of two processes, and one that is stopped after five steps and goes on."""
    registry = toy_registry()
    resolved = toy_recipe(
        registry, "classifier", "tdat", "plain", "run.batch_size=8", "run.max_train=54"
    )
    train(resolved, Path(folder) / "whole", registry=registry)
    stops = iter([*[False] * 5, True])
    with suppress(Preempted):
        train(resolved, Path(folder) / "cut", registry=registry, stop=lambda: next(stops))
    train(resolved, Path(folder) / "cut", registry=registry, resume=True)


def test_each_process_keeps_the_perturbations_of_its_own_places(tmp_path: Path) -> None:
    every_rank(runs, str(tmp_path))
    assert different(tmp_path / "whole", tmp_path / "cut") == []
    state = load(tmp_path / "whole" / "checkpoints" / "step-00000012")
    one, other = (part["objective"]["m"] for part in (state, *state["ranks"]))
    assert one.shape == other.shape == (4, 1, 8, 8)
    assert not torch.equal(one, other)
