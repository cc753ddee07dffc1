"""What trainers on generated images add: smoothed and mixed labels, their network, Adam attacks."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from logits import batch_of, identity_backbone, logits
from strategies import seeds
from torch import nn
from toys import REGISTRY, backbone_of, gen, objective_of, toy_recipe, toy_registry

from jemkit import Augmentation, Bounds, Loader, MisfitError, Views, resolve, soft_labels
from jemkit.attacks.pgd import PGD
from jemkit.config.optim import Schedule
from jemkit.data import Mixed, cut_mixed
from jemkit.models.networks import seeded_init
from jemkit.sampling.kernels import run
from jemkit.sampling.stateful_kernels import AdamDescent
from jemkit.testing.toys import toy_images
from jemkit.training.build import build_run
from jemkit.updaters import EMA
from jemkit_plugins.resnet import SwishWRN, _same_convolution

X = logits((0.5, 0.3, 0.2), (0.2, 0.6, 0.2))
SECOND = torch.tensor([False, True])


def test_label_smoothing_worked_by_hand() -> None:
    batch = batch_of(X, 0, 1)
    both = [[0.8, 0.1, 0.1], [0.1, 0.8, 0.1]]
    torch.testing.assert_close(soft_labels(batch, 3, 0.3), torch.tensor(both))
    only = soft_labels(batch._replace(generated=SECOND), 3, 0.3, only_generated=True)
    torch.testing.assert_close(only, torch.tensor([[1.0, 0, 0], both[1]]))
    real = soft_labels(batch, 3, 0.3, only_generated=True)
    assert torch.equal(real, torch.eye(3)[:2])


def test_trades_smooths_all_labels_or_those_of_generated_images() -> None:
    batch = batch_of(X, 0, 1)._replace(generated=SECOND)
    plain = [-math.log(0.5), -math.log(0.6)]
    smoothed = [
        -(0.8 * math.log(p) + 0.1 * math.log(q) + 0.1 * math.log(r))
        for p, q, r in ((0.5, 0.3, 0.2), (0.6, 0.2, 0.2))
    ]
    wanted = {
        "all": sum(smoothed) / 2, "generated": (plain[0] + smoothed[1]) / 2,
    }  # fmt: skip
    for smooth, value in wanted.items():
        objective = objective_of("trades", beta=0, smoothing=0.3, smooth=smooth)
        term = objective.loss(identity_backbone(3), batch, None).parts["p(y|x)"][1]
        assert float(term.detach()) == pytest.approx(value, rel=1e-5)
    bare = objective_of("trades", beta=0).loss(identity_backbone(3), batch, None)
    assert float(bare.total.detach()) == pytest.approx(sum(plain) / 2, rel=1e-5)


def test_mixed_labels_are_those_of_both_images() -> None:
    mixed = Mixed(torch.tensor([1, 0]), torch.tensor([0.75, 0.5]))
    batch = batch_of(X, 0, 1)._replace(mixed=mixed)
    torch.testing.assert_close(
        soft_labels(batch, 3), torch.tensor([[0.75, 0.25, 0], [0.5, 0.5, 0]])
    )


@given(seed=seeds, smoothing=st.floats(0, 0.9), n=st.integers(1, 9))
def test_cutmix_pastes_what_its_weight_says_and_its_labels_sum_to_one(
    seed: int, smoothing: float, n: int
) -> None:
    x = torch.arange(n, dtype=torch.float32).view(n, 1, 1, 1).expand(n, 2, 9, 7)
    result, mixed = cut_mixed(x, gen(seed))
    own = (result == x).float().mean((1, 2, 3))
    if n > 1:
        torch.testing.assert_close(own, mixed.weight)
        assert torch.isin(result, x).all()
    batch = batch_of(X[:1].expand(n, 3), *[i % 3 for i in range(n)])._replace(mixed=mixed)
    totals = soft_labels(batch, 3, smoothing).sum(1)
    torch.testing.assert_close(totals, torch.ones(n))


def test_cutmix_changes_the_classifiers_view_alone_and_not_every_objective_takes_it() -> None:
    form = {"bounds": Bounds(), "augmentation": Augmentation()}
    images = toy_images(20, 3, 8, 1, 0)
    plain = Loader(images, 8, gen(), views=Views(), **form).batch()
    batch = Loader(images, 8, gen(), views=Views(cutmix=True), **form).batch()
    assert plain.mixed is None
    assert batch.mixed is not None
    assert torch.equal(batch.x_pos, plain.x_pos)
    assert not torch.equal(batch.x, plain.x)
    mixing = "backbone.views.cutmix=true"
    with pytest.raises(MisfitError, match="mixes labels, which the objective 'pgdat'"):
        build_run(toy_recipe(toy_registry(), "classifier", "pgdat", "plain", mixing).recipe)
    for name in ("trades", "score"):
        parts = build_run(toy_recipe(toy_registry(), "classifier", name, "plain", mixing).recipe)
        terms = parts.objective.loss(parts.backbone, parts.loader.batch(), None)
        assert terms.total.isfinite()


def test_same_padding_at_stride_2_worked_by_hand() -> None:
    conv = _same_convolution(1, 1, 2)
    with torch.no_grad():
        conv[1].weight.fill_(1.0)
    x = torch.arange(16.0).view(1, 1, 4, 4)
    # 3 x 3 windows from rows and columns 0 and 2; a fifth row and column of zeros
    wanted = [[45.0, 39.0], [66.0, 50.0]]
    assert conv(x)[0, 0].tolist() == wanted


def test_the_swish_network_has_its_papers_parameters_and_normalises_inside() -> None:
    with torch.device("meta"):
        network = SwishWRN().build((3, 32, 32))
    heads = 640 * 10 + 10
    assert round((sum(p.numel() for p in network.parameters()) + heads) / 1e6, 2) == 36.48
    plain, inside = (SwishWRN(depth=10, width=1, **options) for options in (
        {}, {"mean": (0.5,), "std": (0.25,)},
    ))  # fmt: skip
    built = []
    for spec in (plain, inside):
        with seeded_init(gen()):
            built.append(spec.build((1, 8, 8)).eval())
    x = torch.rand((2, 1, 8, 8), generator=gen()) * 2 - 1
    torch.testing.assert_close(built[1](x), built[0](2 * x))  # ((x + 1) / 2 - 0.5) / 0.25
    with pytest.raises(MisfitError, match="expected one for each of the 3 channels"):
        inside.build((3, 32, 32))


def test_without_an_offset_the_norms_of_blocks_learn_their_scale_alone() -> None:
    network = SwishWRN(depth=10, width=1, offset=False).build((1, 8, 8))
    norms = {n: m for n, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert {n for n, m in norms.items() if m.bias.requires_grad} == {"norm"}
    assert all(m.momentum == 0.01 for m in norms.values())


@given(seed=seeds, steps=st.integers(0, 12), radius=st.floats(1, 30))
def test_an_attack_by_adam_stays_in_the_ball_and_in_the_range(
    seed: int, steps: int, radius: float
) -> None:
    backbone, bounds = backbone_of("classifier"), Bounds()
    x = torch.rand((3, 1, 8, 8), generator=gen(seed)) * 2 - 1
    attack = PGD(steps=steps, optimizer="adam")
    x_adv = attack.draw(
        backbone.model, lambda z: backbone.model(z).energy, x, gen(seed), bounds=bounds,
        radius_px=radius,
    )  # fmt: skip
    assert (x_adv - x).abs().max() <= bounds.px(radius) + 1e-6
    assert x_adv.abs().max() <= 1
    assert torch.equal(bounds.clamp(x_adv), x_adv)


def test_adam_on_pixels_is_torchs_with_a_tenth_of_the_rate_in_the_second_half() -> None:
    target = torch.rand((2, 1, 4, 4), generator=gen())
    x = nn.Parameter(torch.zeros_like(target))
    torchs = torch.optim.Adam([x], lr=0.2, eps=1e-9)
    for step in range(10):
        torchs.param_groups[0]["lr"] = 0.2 if step < 5 else 0.02
        torchs.zero_grad()
        (x - target).square().sum().backward()
        torchs.step()

    def energy(z: torch.Tensor) -> torch.Tensor:
        return (z - target).square().flatten(1).sum(1)

    ours = run(AdamDescent(step_size=0.2, drop=5), energy, torch.zeros_like(target), gen(), 10)
    torch.testing.assert_close(ours, x.detach())
    assert PGD(optimizer="adam").label == "pgd10-adam"


@pytest.mark.parametrize(("steps", "far"), [(4, 10 + 10 + 1 + 1), (5, 10 + 10 + 1 + 1 + 1)])
def test_an_attack_by_adam_has_a_tenth_of_the_rate_in_its_second_half(steps: int, far: int) -> None:
    """Adam moves by its rate in each step up a constant slope."""
    attack = PGD(steps=steps, optimizer="adam", step_px=10, start="clean")
    x, bounds = torch.zeros(2, 1, 4, 4), Bounds()
    x_adv = attack.draw(
        nn.Identity(), lambda z: z.flatten(1).sum(1), x, gen(), bounds=bounds, radius_px=100
    )
    torch.testing.assert_close(x_adv, torch.full_like(x, bounds.px(far)))


def test_one_cycle_is_torchs_at_every_step() -> None:
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0, momentum=0.9)
    torchs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1.0, total_steps=200, pct_start=0.1
    )
    ours = Schedule(decay="onecycle", warmup=10**6, warmup_share=0.1)
    for step in range(200):
        group = optimizer.param_groups[0]
        assert ours.factor(step, 200) == pytest.approx(group["lr"], rel=1e-6)
        assert ours.momentum(step, 200) == pytest.approx(group["momentum"], rel=1e-6)
        optimizer.step()
        if step < 199:
            torchs.step()
    assert Schedule(decay="cosine").momentum(3, 200) is None
    assert Schedule(decay="onecycle", warmup=0).factor(0, 1) == 1


def test_the_average_is_a_copy_and_then_its_decay_rises() -> None:
    model = nn.Linear(1, 1, bias=False)
    ema = EMA(model, 0.995)
    for n, value in ((-2, 1.0), (-1, 2.0), (0, 3.0)):
        with torch.no_grad():
            model.weight.fill_(value)
        ema.update(model, n)
    assert float(ema.average["weight"]) == pytest.approx(0.1 * 2 + 0.9 * 3)


def test_batch_norm_does_not_decay_where_the_optimizer_says_so() -> None:
    options = ("optimizer.decay_norms=false", "optimizer.weight_decay=0.1")
    parts = build_run(toy_recipe(toy_registry(), "classifier", "trades", "plain", *options).recipe)
    model = parts.backbone.model
    norms = {p for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    first, second = parts.optimizer.param_groups
    assert first["weight_decay"] == 0.1
    assert second["weight_decay"] == 0
    assert set(second["params"]) == norms
    assert {*first["params"], *second["params"]} == set(model.parameters())


def test_the_presets_are_the_sheets() -> None:
    gowal = resolve(REGISTRY, preset="gowal", overrides=["data.use=cifar10"]).recipe
    assert gowal.extra.fraction == 0.7
    assert not gowal.extra.on
    assert gowal.backbone.views.stats_from == ("x_adv",)
    better = resolve(REGISTRY, preset="betterdm", overrides=["data.use=cifar100"]).recipe
    assert better.objective.smoothing == 0.1
    assert better.objective.beta == 5
    assert (better.run.ema_warmup, better.run.ema_copy) == (True, 0.025)
