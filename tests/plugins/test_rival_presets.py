"""Presets of rivals have their papers' constants, and their learning rates drop at the epochs."""

from typing import Any

import pytest
from toys import REGISTRY

from jemkit import resolve
from jemkit.config.layers import flat
from jemkit.config.recipe import Resolved

CIFAR = {
    "mart": {"run.epochs": 90, "objective.beta": 6, "optimizer.weight_decay": 7e-4,
             "objective.attack.radius_px": 255 * 0.031, "objective.attack.step_px": 255 * 0.007},
    "mart-resnet18": {"run.epochs": 120, "objective.beta": 5, "optimizer.weight_decay": 3.5e-3},
    "pgdat": {"run.epochs": 228, "run.valid_fraction": 0.1},  # 80,000 steps of 45,000 images
    "trades": {"run.epochs": 76, "objective.beta": 6, "objective.attack.start": "gaussian",
               "objective.attack.radius_px": 255 * 0.031},
    "at-awp": {"run.epochs": 200, "updater.gamma": 0.01, "updater.start": 0,
               "optimizer.weight_decay": 5e-4, "objective.use": "pgdat"},
    "trades-awp": {"run.epochs": 200, "updater.gamma": 0.005, "updater.start": 9 / 200,
                   "objective.beta": 6, "objective.attack.start": "gaussian"},
    "lbgat": {"run.epochs": 100, "objective.beta": 6, "optimizer.weight_decay": 2e-4,
              "objective.teacher.strides": [1, 1, 2, 2], "objective.attack.radius_px": 255 * 0.031,
              "objective.attack.step_px": 255 * 0.007},
    "lbgat0": {"objective.beta": 0},
    "lasat": {"run.epochs": 110, "objective.every": 20, "objective.robust": 4,
              "objective.clean": 2, "objective.smoothing": 0.3, "objective.update.use": "plain"},
    "lasat-trades": {"run.epochs": 100, "objective.every": 1, "objective.robust": 8,
                     "objective.clean": 4},
    "lasat-awp": {"run.epochs": 200, "objective.update.use": "awp", "updater.use": "awp",
                  "updater.gamma": 0.01, "objective.robust": 1, "objective.clean": 1},
    "lasat-cifar100": {"objective.iterations": [*range(3, 13)]},
    "lasat-trades-cifar100": {"objective.eps_px": [*range(5, 11)]},
    "lasat-awp-cifar100": {"objective.iterations": [*range(8, 16)]},
    "tdat": {"run.epochs": 110, "objective.weight": 0.6, "objective.gamma_min": 0.15,
             "objective.relaxation": 0.6},
    "tdat-cifar100": {"objective.weight": 0.05, "objective.gamma_min": 0.05},
    "tdat-paper": {"objective.variant": "paper"},
    "ducat": {"run.epochs": 130, "objective.start": 104 / 130, "objective.clean_dummy": 0.25,
              "objective.adv_dummy": 1, "objective.adv_mass": 1},
    "agr-trades": {"run.epochs": 200, "updater.start": 155 / 200, "updater.clip": 0.1,
                   "objective.climbs": "ce", "objective.beta": 6},
    "weat": {"run.epochs": 100, "objective.beta": 6, "objective.of": "adversarial",
             "schedule.decay": "onecycle", "schedule.warmup_share": 0.25},
    "weat-natural": {"objective.of": "natural", "schedule.decay": "onecycle"},
    "score": {"run.epochs": 400, "run.batch_size": 512, "run.ema_decay": 0.995,
              "run.valid_fraction": 1024 / 50_000,
              "run.ema_copy": 0.025, "objective.beta": 4, "objective.c": 0, "extra.fraction": 0.7,
              "objective.smoothing": 0, "optimizer.lr": 0.2, "optimizer.nesterov": True,
              "optimizer.decay_norms": False, "schedule.decay": "onecycle",
              "schedule.warmup_share": 0.025},
    "score-released": {"objective.beta": 3, "run.valid_fraction": 1024 / 50_000},
    "betterdm": {"run.epochs": 400, "run.batch_size": 512, "objective.beta": 5,
                 "run.valid_fraction": 1024 / 50_000,
                 "objective.smoothing": 0.1, "objective.smooth": "all", "optimizer.lr": 0.2,
                 "run.ema_decay": 0.995, "run.ema_warmup": True, "run.ema_copy": 0.025,
                 "backbone.network.bn_momentum": 0.01,
                 "backbone.network.mean": [0.4914, 0.4822, 0.4465],
                 "backbone.network.std": [0.2471, 0.2435, 0.2616]},
    "betterdm-cifar100": {"objective.beta": 5, "optimizer.decay_norms": False,
                          "run.valid_fraction": 1024 / 50_000,
                          "backbone.network.mean": [0.5071, 0.4865, 0.4409]},
    "score-cifar100": {"objective.beta": 4, "optimizer.decay_norms": False,
                       "run.valid_fraction": 1024 / 50_000,
                       "backbone.network.std": [0.2673, 0.2564, 0.2762]},
    "gowal": {"run.epochs": 400, "run.batch_size": 1024, "objective.beta": 6,
              "run.valid_fraction": 1024 / 50_000,
              "objective.smoothing": 0.1, "objective.smooth": "generated", "run.ema_copy": 0,
              "objective.attack.optimizer": "adam", "optimizer.lr": 0.4,
              "backbone.network.offset": False, "schedule.decay": "cosine",
              "backbone.views.stats_from": ["x_adv"]},
    "dat-stage1": {"run.epochs": 300, "objective.attack.norm": "L2", "optimizer.nesterov": True,
                   "run.ema_decay": 0.999, "run.ema_warmup": True, "schedule.decay": "cosine"},
    "dat": {"objective.auc": 0.8, "objective.max_steps": 50, "objective.step_px": 25.5,
            "objective.window": 1000, "optimizer.lr": 1e-3, "optimizer.weight_decay": 5e-4,
            "backbone.sampler.step_size": 0.4},  # of a range of 2: 0.2 in [0, 1]
    "dat-cifar100": {"objective.auc": 0.75, "optimizer.lr": 0.01},
}  # fmt: skip
"""By name; a preset of another variant has what its own lines add."""

DIGITS = {
    "betterdm-digits": {"objective.beta": 5, "objective.smoothing": 0.1, "run.ema_decay": 0.995,
                        "run.ema_warmup": True, "schedule.decay": "onecycle"},
    "gowal-digits": {"objective.beta": 6, "objective.smooth": "generated",
                     "objective.attack.optimizer": "adam", "schedule.decay": "cosine"},
    "score-digits": {"objective.beta": 4},
    "agr-trades-digits": {"updater.start": 155 / 200, "objective.climbs": "ce"},
    "ducat-digits": {"objective.start": 104 / 130},
    "jeat-digits": {"backbone.use": "jempp", "objective.w_px": 1},
}  # fmt: skip

RATES = {
    "mart": {0: 0.1, 74: 0.01, 89: 0.001},
    "mart-resnet18": {0: 0.01, 74: 1e-3, 89: 1e-4, 99: 1e-5},
    "trades": {0: 0.1, 74: 0.01},
    "at-awp": {0: 0.1, 100: 0.01, 150: 1e-3},
    "trades-awp": {0: 0.1, 100: 0.01, 150: 1e-3},
    "lbgat": {1: 0.1, 75: 0.01, 90: 1e-3},
    "lasat": {0: 0.1, 99: 0.01, 104: 1e-3},
    "lasat-trades": {0: 0.1, 75: 0.01, 90: 1e-3},
    "lasat-awp": {0: 0.1, 100: 0.01, 150: 1e-3},
    "tdat": {0: 0.1, 100: 0.01, 105: 1e-3},
    "agr-trades": {0: 0.1, 100: 0.01, 150: 1e-3},
    "dat": {0: 1e-3, 99: 1e-3},
}
"""The learning rate from the start of an epoch on, counted from 0."""


def resolved(name: str, dataset: str) -> Resolved:
    data = "cifar100" if name.endswith("cifar100") else dataset
    return resolve(REGISTRY, preset=name, overrides=[f"data.use={data}"])


def settings(name: str, dataset: str) -> dict[str, Any]:
    recipe = resolved(name, dataset).recipe
    return dict(flat(recipe.model_dump(mode="json", context=REGISTRY.context)))


@pytest.mark.parametrize(("name", "wanted"), [*CIFAR.items(), *DIGITS.items()])
def test_a_preset_has_the_constants_of_its_paper(name: str, wanted: dict[str, Any]) -> None:
    given = settings(name, "digits" if name in DIGITS else "cifar10")
    for key, value in wanted.items():
        exact = isinstance(value, str | list | bool)
        assert given[key] == (value if exact else pytest.approx(value, rel=1e-3)), key
    assert given.get("objective.attack.steps", 10) == 10


@pytest.mark.parametrize(("name", "rates"), RATES.items())
def test_learning_rates_drop_at_the_epochs_of_the_paper(name: str, rates: dict[int, float]) -> None:
    recipe, per_epoch = resolved(name, "cifar10").recipe, 390
    total, rate = recipe.run.epochs * per_epoch, 0.0
    for epoch, after in rates.items():
        step = epoch * per_epoch
        factor = recipe.schedule.factor(step, total)
        assert recipe.optimizer.lr * factor == pytest.approx(after), epoch
        if epoch > 1:
            before = recipe.schedule.factor(step - 1, total)
            assert recipe.optimizer.lr * before == pytest.approx(rate), epoch
        rate = after
