"""LBGAT: the loss worked by hand, and that the teacher learns beside the student and is kept."""

from collections.abc import Iterable
from math import log
from pathlib import Path

import pytest
import torch
from groups import batch_of as batch_at
from groups import part_of
from logits import batch_of, identity_backbone, logits
from ranks import every_rank
from states import cut_and_resumed
from torch import Tensor, nn
from toys import backbone_of, gen, tiny, toy_recipe, toy_registry

from jemkit import Guard, Plain, SmallCNN, Trainer, train_step
from jemkit.runtime import distributed
from jemkit.runtime.pytree import same
from jemkit.runtime.run_dir import RunFolder
from jemkit.runtime.work_cache import WHOLE, Shard
from jemkit.testing import toy_batch, toy_task
from jemkit_plugins.lbgat import LBGAT, LBGATObjective

TASK = toy_task()
CLEAN, ADV = logits((0.5, 0.3, 0.2)), logits((0.2, 0.6, 0.2))


def built(**options: object) -> LBGATObjective:
    result: LBGATObjective = tiny("objective", "lbgat", **options).build(TASK, gen())
    return result


def slopes(term: Tensor, params: Iterable[nn.Parameter]) -> float:
    """The largest gradient of a term, 0 where it has none."""
    grads = torch.autograd.grad(term, [*params], retain_graph=True, allow_unused=True)
    return max((float(g.abs().max()) for g in grads if g is not None), default=0.0)


def test_the_loss_worked_by_hand() -> None:
    objective = LBGATObjective(LBGAT(beta=6), identity_backbone(3).model)  # g(x) = x
    terms = objective.loss(identity_backbone(3), batch_of(CLEAN, 0), ADV)
    parts = {name: float(term.detach()) for name, (_, term) in terms.parts.items()}
    kl = 0.5 * log(0.5 / 0.2) + 0.3 * log(0.3 / 0.6)
    mse = (log(0.5 / 0.2) ** 2 + log(0.3 / 0.6) ** 2) / 3  # over classes too
    assert parts == pytest.approx({"MSE": mse, "p(y|x) of the teacher": log(2), "KL": kl}, rel=1e-5)
    assert float(terms.total.detach()) == pytest.approx(mse + log(2) + 6 * kl, rel=1e-5)


def test_the_teacher_learns_from_the_squared_error_and_its_own_cross_entropy_alone() -> None:
    backbone, objective, batch = backbone_of("classifier", TASK), built(), toy_batch(TASK)
    terms = objective.loss(backbone, batch, objective.draw(backbone, batch, gen()))
    parts = {name: term for name, (_, term) in terms.parts.items()}
    teacher = {name: slopes(term, objective.parameters()) > 0 for name, term in parts.items()}
    student = {name: slopes(term, backbone.model.parameters()) > 0 for name, term in parts.items()}
    assert teacher == {"MSE": True, "p(y|x) of the teacher": True, "KL": False}
    assert student == {"MSE": True, "p(y|x) of the teacher": False, "KL": True}


def test_the_teacher_normalises_by_the_batch_and_its_running_statistics_rest() -> None:
    backbone, objective, batch = backbone_of("classifier", TASK), built(), toy_batch(TASK)
    before = {name: b.clone() for name, b in objective.teacher.named_buffers()}
    assert before
    objective.loss(backbone, batch, objective.draw(backbone, batch, gen()))
    assert all(torch.equal(before[name], b) for name, b in objective.teacher.named_buffers())
    assert all(m.training for m in objective.teacher.modules())


def test_both_move_in_a_step() -> None:
    backbone, objective = backbone_of("classifier", TASK), built()
    params = [*backbone.model.parameters(), *objective.parameters()]
    before = [p.detach().clone() for p in params]
    updater = Plain().build(backbone.model, torch.optim.SGD(params, lr=0.1))
    train_step(backbone, objective, updater, toy_batch(TASK), gen(), Guard())
    moved = [not torch.equal(a, p) for a, p in zip(before, params, strict=True)]
    assert sum(moved) > len(moved) / 2
    assert any(moved[-len(objective.parameters()) :])


@pytest.mark.parametrize("updater", ["plain", "awp"])
def test_a_run_trains_saves_and_resumes_the_teacher_and_judges_the_student(
    tmp_path: Path, updater: str
) -> None:
    registry = toy_registry()
    options = ["objective.attack.steps=2", "objective.teacher.norm=batch"]
    resolved = toy_recipe(registry, "classifier", "lbgat", updater, *options)
    began, cut, ended, resumed = cut_and_resumed(resolved, tmp_path)
    assert not same(ended["objective"], began["objective"])
    for part in ("model", "objective", "optimizer"):
        assert same(ended[part], resumed[part]), part
    assert not [name for name in ended["model"] if "teacher" in name]
    fresh = Trainer(resolved, RunFolder.create(tmp_path / "fresh")).state_dict()["objective"]
    forgot = Trainer(resolved, RunFolder.create(tmp_path / "forgot"))
    forgot.load_state_dict({**cut, "objective": fresh})
    forgot.run(until=4)
    assert not same(ended["model"], forgot.state_dict()["model"])


def test_without_the_divergence_clean_images_pass_through_the_teacher_alone() -> None:
    backbone, objective, batch = backbone_of("classifier", TASK), built(beta=0), toy_batch(TASK)
    recorded: list[int] = []
    backbone.model.network.register_forward_hook(lambda m, args, out: recorded.append(len(args[0])))
    draws = objective.draw(backbone, batch, gen())
    recorded.clear()
    terms = objective.loss(backbone, batch, draws)
    assert recorded == [6]
    assert list(terms.parts) == ["MSE", "p(y|x) of the teacher"]
    assert objective.streams == ("x_adv",)


def test_teachers_begin_equal_from_one_seed() -> None:
    one, other = (LBGAT(teacher=SmallCNN()).build(TASK, gen(3)) for _ in range(2))
    assert same(one.state_dict(), other.state_dict())


def updated(me: Shard) -> dict[str, Tensor]:
    """Student and teacher after steps on images that are the same however many processes share
    them."""
    network = SmallCNN(channels=2, norm="none")
    backbone, still = (backbone_of("classifier", TASK, network=network) for _ in range(2))
    objective, guard = built(teacher=network), Guard()
    params = [*backbone.model.named_parameters(), *objective.teacher.named_parameters(prefix="g")]
    updater = Plain().build(backbone.model, torch.optim.SGD([p for _, p in params], lr=0.1))
    for step in range(4):
        batch = batch_at(step)
        x_adv = objective.draw(still, batch, gen(step))
        own, drawn = part_of(batch, me), x_adv[me.rank :: me.size]
        updater.step(lambda own=own, x=drawn: objective.loss(backbone, own, x), guard)
    return {name: p.detach() for name, p in params}


def all_updated() -> dict[str, Tensor]:
    with distributed.together():
        return updated(distributed.shard())


def test_two_processes_move_student_and_teacher_as_one_does() -> None:
    alone, (one, other) = updated(WHOLE), every_rank(all_updated)
    assert any(name.startswith("g.") for name in alone)
    for name, p in alone.items():
        assert torch.equal(one[name], other[name]), name
        torch.testing.assert_close(one[name], p, rtol=0, atol=1e-5)
