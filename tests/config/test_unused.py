"""Every option acts, or is refused where the others leave it nothing to do."""

import json
import logging
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import Field
from toys import REGISTRY, gen, toy_recipe, toy_registry

from jemkit import PGD, Buffer, Guard, Options, Views, resolve, train_step
from jemkit.config.eval_settings import Settings, attacks_of, evaluators_of
from jemkit.config.optim import SGD, Adam, Schedule
from jemkit.config.unused import check_given
from jemkit.errors import ConfigError
from jemkit.training.build import build_run

TOYS = toy_registry()


@cache
def outcome(backbone: str, objective: str, *sets: str) -> dict[str, torch.Tensor]:
    """All that two steps of a toy run leave behind."""
    recipe = toy_recipe(TOYS, backbone, objective, "plain", *sets).recipe
    parts = build_run(recipe)
    parts.backbone.model.train()
    rng, guard = gen(), Guard()
    for step in range(2):
        factor = recipe.schedule.factor(step + 5, parts.task.total_steps)
        for group in parts.optimizer.param_groups:
            group["lr"] = recipe.optimizer.lr * factor
        train_step(parts.backbone, parts.objective, parts.updater, parts.loader.batch(), rng, guard)
    left = {name: t.detach().clone() for name, t in parts.backbone.model.state_dict().items()}
    if parts.backbone.has_density:
        state = parts.backbone.density.state_dict()
        left |= {name: t.clone() for name, t in state.items() if name == "states"}
    return left


E = ("sadajem", "ebjdat", "objective")
D = ("dat", "dat", "")
J = ("jem", "jem", "")
ACTS: list[tuple[tuple[str, str, str], list[str], str]] = [
    *[(E, [], f"objective.{s}") for s in (
        "w1=0.9", "w2=0.9", "w3=0.9", "w_clean=0.9", "adv_steps=3", "radius_px=60",
        "ascent.step_px=1", "ascent.use=l2", "ascent.use=sgld", "inner=marginal",
        "outer=contrastive", "distance.use=logits",
    )],
    (E, ["objective.ascent.use=l2"], "objective.ascent.step_px=1"),
    *[(E, ["objective.ascent.use=sgld"], f"objective.ascent.{s}") for s in (
        "step_size=0.5", "noise=0.1", "clip=0.0001",
    )],
    (E, ["objective.radius_px=60"], "objective.norm=L2"),
    (E, ["objective.distance.use=l2", "objective.ascent.use=sgld"], "objective.distance_weight=99"),
    *[(("sadajem", "ebjdatreleased", ""), [], f"objective.{s}") for s in (
        "w1=0.9", "w2=0.9", "w3=0.9", "w_clean=0.9", "adv_steps=3", "start_px=1", "step_px=2",
        "climbs=ce",
    )],
    *[(J, [], s) for s in (
        "objective.w_px=0.5", "objective.w_pyx=0.5", "backbone.steps=1", "backbone.start.use=noise",
        "backbone.sampler.use=pyld", "backbone.sampler.step_size=0.5", "backbone.sampler.noise=0.1",
        "backbone.sampler.clip=0.0001", "backbone.density.box=true", "backbone.density.penalty=1",
        "backbone.density.batch_norm=running_stats", "backbone.density.batch_norm=released",
        "backbone.buffer.capacity=90", "backbone.buffer.restart=0.9",
        "backbone.views.augment_x=false", "backbone.views.augment_pos=false",
        "backbone.views.noise_x=0", "backbone.views.noise_pos=0", "backbone.views.pos_share=0.5",
        'backbone.views.stats_from=["x_neg"]', "backbone.energy.use=linear",
        "backbone.network.channels=3", "backbone.network.norm=group", "backbone.network.use=mlp",
        "updater.use=sam", "updater.use=awp", "optimizer.lr=0.02", "optimizer.momentum=0.1",
        "optimizer.nesterov=true", "optimizer.weight_decay=0.5", "optimizer.use=adam",
        "schedule.decay=cosine", "schedule.at=[0.1]", 
        "schedule.warmup_share=0.9", "run.batch_size=6", "run.seed=1",
        "run.valid_fraction=0.3", "run.max_train=30",
    )],
    (J, ["schedule.at=[0.1]"], "schedule.by=0.9"),
    (J, ["schedule.warmup_share=0.9"], "schedule.warmup=1"),
    (J, ["backbone.density.penalty=1"], "backbone.density.penalty_on=positives"),
    (J, ["backbone.sampler.use=pyld"], "backbone.sampler.inner_steps=2"),
    (J, ["backbone.sampler.use=pyld"], "backbone.sampler.step_size=0.5"),
    (J, ["backbone.sampler.use=pyld"], "backbone.sampler.clip=0.0001"),
    (J, ["backbone.sampler.use=sign"], "backbone.sampler.step_size=0.5"),
    (J, ["backbone.sampler.use=l2"], "backbone.sampler.step_size=0.5"),
    *[(J, ["backbone.sampler.use=sgld_momentum"], f"backbone.sampler.{s}")
      for s in ("step_size=0.5", "momentum=0.1", "noise=0.1", "clip=0.0001")],
    *[(J, ["backbone.sampler.use=mala"], f"backbone.sampler.{s}")
      for s in ("step_size=0.5", "temperature=0.1")],
    (J, ["backbone.start.use=noise"], "backbone.start.std=0.1"),
    (J, ["backbone.start.use=pca"], "backbone.start.variance=0.2"),
    (J, ["backbone.start.use=pca"], "backbone.start.sigma=0.005"),
    (J, ["backbone.buffer.conditional=true"], "objective.negatives=conditional"),
    (J, ["backbone.network.use=mlp"], "backbone.network.hidden=8"),
    (J, ["backbone.network.use=mlp"], "backbone.network.layers=1"),
    *[(J, ["backbone.network.use=resnet-18", "backbone.network.width=2"], f"backbone.network.{o}")
      for o in ("width=3", "depth=34", "strides=[1, 1, 2, 2]", "norm=group")],
    (J, ["backbone.network.use=wrn-10-1"], "backbone.network.width=2"),
    (J, ["backbone.network.use=wrn-10-1"], "backbone.network.depth=16"),
    (J, ["backbone.network.use=wrn-10-1"], "backbone.network.norm=group"),
    (J, ["backbone.network.use=wrn-10-1", "backbone.network.norm=batch"],
     "backbone.network.bn_momentum=0.9"),
    (J, ["updater.use=sam"], "updater.rho=1"),
    (J, ["updater.use=sam"], "updater.adaptive=true"),
    (J, ["updater.use=awp"], "updater.gamma=0.1"),
    (J, ["updater.use=awp"], "updater.start=0.5"),
    (J, ["updater.use=agr", "updater.start=0"], "updater.clip=0.001"),
    (J, ["updater.use=agr"], "updater.start=0"),
    (J, ["updater.use=agr", "updater.start=0"], "updater.update.use=awp"),
    (J, ["updater.use=agr", "updater.update.use=awp"], "updater.update.gamma=0.1"),
    (J, ["optimizer.use=adam"], "optimizer.betas=[0.1, 0.9]"),
    (J, ["optimizer.use=adam"], "optimizer.lr=0.02"),
    (J, ["optimizer.use=adam"], "optimizer.weight_decay=0.5"),
    (J, ["optimizer.use=adam", "optimizer.weight_decay=0.5"], "optimizer.decay_norms=false"),
    (J, ["schedule.decay=cosine", "optimizer.lr=0.1"], "schedule.floor=0.9"),
    (("classifier", "trades", ""), [], "objective.climbs=ce"),
    *[(("classifier", "trades", ""), [], option) for option in (
        "objective.beta=1", "objective.smoothing=0.1", "objective.attack.optimizer=adam",
        "backbone.views.cutmix=true", "schedule.decay=onecycle",
    )],
    (("classifier", "trades", ""), ["objective.smoothing=0.1"], "objective.smooth=generated"),
    (J, ["optimizer.weight_decay=0.5"], "optimizer.decay_norms=false"),
    *[(J, ["backbone.network.use=swishwrn-10-1", "backbone.network.norm=batch",
           "backbone.network.mean=[0.5]", "backbone.network.std=[0.5]"], f"backbone.network.{o}")
      for o in ("width=2", "depth=16", "norm=group", "bn_momentum=0.9", "offset=false",
                "mean=[0.4]", "std=[0.4]")],
    *[(("classifier", name, ""), [], f"objective.attack.{s}")
      for name in ("pgdat", "trades")
      for s in ("steps=1", "radius_px=5", "step_px=1", "start=gaussian", "batch_norm=batch_stats")],
    *[(("classifier", name, ""), [], "objective.attack.batch_norm=released")
      for name in ("mart", "weat", "score", "lbgat", "trades")],
    *[(("classifier", name, ""), [], f"objective.{option}") for name, option in (
        ("mart", "beta=1"), ("mart", "attack.start=uniform"), ("weat", "beta=1"),
        ("weat", "of=natural"), ("weat", "attack.steps=1"), ("score", "beta=1"),
        ("score", "c=0.1"), ("score", "smoothing=0.1"), ("score", "attack.steps=1"),
        ("tdat", "weight=0.1"), ("tdat", "relaxation=0.1"), ("tdat", "radius_px=5"),
        ("tdat", "variant=paper"), ("tdat", "gamma_min=0.99"),
    )],
    (("classifier", "ducat", ""), [], "objective.start=0"),
    (("classifier", "ce", ""), ["backbone.energy.use=dummies"], "backbone.energy.fold=max"),
    *[(("classifier", "ducat", ""), ["objective.start=0"], f"objective.{option}")
      for option in ("clean_dummy=0.5", "adv_dummy=0.5", "adv_mass=0.5", "attack.steps=1")],
    (("classifier", "ducat", ""), [], "objective.variant=trades"),
    (("classifier", "ducat", ""), [], "objective.variant=mart"),
    (("classifier", "ducat", ""), [], "objective.variant=consistency"),
    (("classifier", "ducat", ""), ["objective.variant=mart"], "objective.beta=1"),
    *[(("classifier", "ducat", ""), ["objective.variant=consistency"], f"backbone.views.{option}")
      for option in ("augment_pos=false", "noise_pos=0.5")],
    *[(("classifier", "ducat", ""), ["objective.variant=consistency"], f"objective.{option}")
      for option in ("consistency=9", "temperature=9")],
    *[(("classifier", "lbgat", ""), [], f"objective.{option}")
      for option in ("beta=1", "attack.steps=1", "teacher.channels=3")],
    *[(("classifier", "lasat", ""), [], f"objective.{option}") for option in (
        "form=trades", "radius_px=9", "eps_px=[9]", "iterations=[1]", "step_px=[9]",
        "smoothing=0.1", "strategy.channels=3", "strategy_lr=9",
    )],
    *[(("classifier", "lasat", ""), ["objective.form=trades", "objective.strategy_lr=1"],
       f"objective.{option}") for option in ("robust=900", "clean=900")],
    (("classifier", "lasat", ""), ["objective.form=trades", "objective.strategy_lr=1",
     "optimizer.lr=0.1", "objective.update.use=awp"], "objective.update.gamma=9"),
    (("classifier", "lasat", ""), ["objective.form=trades"], "objective.beta=[1]"),
    (("classifier", "lasat", ""), ["objective.form=trades"], "objective.every=2"),
    (("classifier", "lasat", ""), ["objective.form=trades", "objective.strategy_lr=0.3",
     "objective.robust=0.5"], "objective.baseline=ema"),  # other forms clip the gradient
    *[(D, [], s) for s in (
        "objective.step_px=5", "objective.auc=1", "objective.window=99",
        "objective.freeze_batch_norm=false", "objective.attack.steps=1", "backbone.start.share=1",
        "backbone.start.use=shuffled",
    )],
    (D, ["backbone.start.use=shuffled"], "backbone.start.squares=2"),
    (("dat", "jem", ""), [], "backbone.steps=1"),
    (("dat", "jem", ""), [], "backbone.sampler.step_size=0.1"),
    (("jem", "jeat", ""), [], "objective.w_px=0.5"),
    (("jem", "jeat", ""), [], "objective.attack.steps=1"),
    (("classifier", "pgdat", ""), ["objective.attack.radius_px=90"], "objective.attack.norm=L2"),
]  # fmt: skip
"""A pair of parts, settings that an option needs beside it, and the option."""


@pytest.mark.parametrize(("pair", "beside", "option"), ACTS, ids=lambda row: str(row))
def test_an_option_of_training_changes_what_training_leaves_behind(
    pair: tuple[str, str, str], beside: list[str], option: str
) -> None:
    backbone, objective, _ = pair
    without, ours = (outcome(backbone, objective, *beside, *more) for more in ([], [option]))
    same = without.keys() == ours.keys() and all(
        without[name].shape == t.shape and torch.equal(without[name], t) for name, t in ours.items()
    )
    assert not same


ELSEWHERE = {
    "Adam": "use", "Buffer": "conditional", "DAT": "max_steps", "Foreign": "dataset",
    "LPIPS": "net weights download", "PGD": "restarts", "SGD": "use", "Timm": "model",
    "Torchvision": "model",
}  # fmt: skip
"""Options with tests of their own: what two steps of a toy run do not show."""


def test_every_option_of_training_has_a_row() -> None:
    acting: dict[type[Options], set[str]] = {}
    for (backbone, objective, _), beside, option in ACTS:
        holder: Any = toy_recipe(TOYS, backbone, objective, "plain", *beside, option).recipe
        *where, last = option.partition("=")[0].removesuffix(".use").split(".")
        for name in where:
            holder = getattr(holder, name)
        acting.setdefault(type(holder), set()).add(last)
    kinds = ("network", "sampler", "energy", "start", "density", "objective", "updater", "ascent",
             "distance")  # fmt: skip
    parts = [part for kind in kinds for part in REGISTRY[kind].values()]
    tables: list[type[Options]] = [PGD, SGD, Adam, Schedule, Views, Buffer]
    for part in [*parts, *tables]:
        untested = {
            name for name, field in part.model_fields.items()
            if name not in acting.get(part, ()) and not isinstance(field.default, Options)
        }  # fmt: skip
        assert untested == set(ELSEWHERE.get(part.__name__, "").split()), part


IDLE: list[tuple[list[str], str, str]] = [
    ([], "objective.distance_weight=3", "without a distance"),
    (["objective.adv_steps=0"], "objective.ascent.step_px=1", "where adv_steps is 0"),
    (["objective.w2=0"], "objective.outer=contrastive", "where w2 is 0"),
    (["objective.w2=0", "objective.w3=0"], "objective.radius_px=9", "where w2 and w3 are 0"),
    (["objective.use=jem", "objective.w_px=0"], "objective.negatives=conditional", "w_px is 0"),
    (["objective.use=trades", "objective.beta=0"], "objective.attack.steps=3", "beta is 0"),
    (["objective.use=score", "objective.beta=0"], "objective.c=1", "beta is 0"),
    (["objective.use=weat", "objective.beta=0", "objective.of=natural"],
     "objective.attack.steps=3", "where beta is 0 and of"),
    (["objective.use=ducat"], "objective.beta=1", "where variant is"),
    (["objective.use=ducat", "objective.start=1"], "objective.adv_mass=0.5", "start is 1"),
    (["updater.use=agr", "updater.start=1"], "updater.clip=1", "where start is 1"),
    (["updater.use=awp", "updater.start=1"], "updater.gamma=1", "where start is 1"),
    (["updater.use=awp", "updater.gamma=0"], "updater.start=0.5", "where gamma is 0"),
    (["objective.use=lasat"], "objective.beta=[1]", 'unless form = "trades"'),
    (["objective.use=lasat", "objective.form=awp"], "objective.smoothing=0.1",
     'unless form = "at"'),
    (["objective.use=tdat", "objective.gamma_min=1"], "objective.relaxation=2", "gamma_min is 1"),
    ([], "backbone.density.penalty_on=positives", "where penalty is 0"),
    (["backbone.sampler.step_size=0"], "backbone.sampler.clip=3", "step_size is 0"),
    (["backbone.network.norm=group"], 'backbone.views.stats_from=["x"]', "without batch norm"),
    (["backbone.network.norm=none"], "backbone.density.batch_norm=released", "without batch norm"),
    (["backbone.network.use=wrn-10-1", "backbone.network.norm=group"],
     "backbone.network.bn_momentum=0.9", "without batch norm"),
    ([], "run.ema_warmup=true", "where ema_decay is 0"),
    (["run.ema_decay=0.9"], "run.ema_copy=0.1", "without ema_warmup"),
    (["optimizer.weight_decay=0"], "optimizer.decay_norms=false", "where weight_decay is 0"),
    (["backbone.network.norm=group"], "optimizer.decay_norms=false", "without batch norm"),
    (["objective.use=trades"], "objective.smooth=generated", "where smoothing is 0"),
    ([], "extra.fraction=0.5", "without a file, --extra-data"),
    (["objective.use=dat", "objective.max_steps=0"], "objective.auc=0.3", "max_steps is 0"),
    (["updater.use=sam", "updater.rho=0"], "updater.adaptive=false", "where rho is 0"),
    (["schedule.decay=cosine"], "schedule.at=[0.3]", 'unless decay = "steps"'),
    (["schedule.decay=constant"], "schedule.by=0.3", 'unless decay = "steps"'),
    (["schedule.decay=steps"], "schedule.floor=0.3", 'unless decay = "cosine"'),
    (["schedule.decay=steps"], "schedule.at=[30, 60]", "never reached"),
    (["schedule.warmup=0"], "schedule.warmup_share=0.3", "if warmup is 0"),
    (["sentinel.on=false"], "sentinel.tries=7", "while the sentinel is off"),
    (["sentinel.tries=0"], 'sentinel.policy=["steps"]', "where tries is 0"),
]  # fmt: skip


@pytest.mark.parametrize(("beside", "option", "needs"), IDLE, ids=lambda row: str(row))
def test_an_option_that_would_do_nothing_is_refused_where_it_is_said(
    beside: list[str], option: str, needs: str
) -> None:
    key = option.partition("=")[0].strip()
    with pytest.raises(ConfigError) as refused:
        toy_recipe(TOYS, "sadajem", "ebjdat", "plain", *beside, option)
    assert str(refused.value).startswith(key)
    assert "does nothing" in str(refused.value)
    assert needs in str(refused.value)
    toy_recipe(TOYS, "sadajem", "ebjdat", "plain", *beside)  # without it nothing is


def test_a_distance_without_weight_is_refused() -> None:
    settings = ["objective.distance.use=l2", "objective.distance_weight=0"]
    with pytest.raises(
        ConfigError, match=r"distance.use = 'l2' does nothing where distance_weight"
    ):
        toy_recipe(TOYS, "sadajem", "ebjdat", "plain", *settings)


def test_on_a_classifier_the_densitys_view_does_nothing() -> None:
    for option in ("augment_pos=false", "noise_pos=0.5", "pos_share=0.5"):
        with pytest.raises(ConfigError, match="on a classifier, which has no density"):
            toy_recipe(TOYS, "classifier", "ce", "plain", f"backbone.views.{option}")
        other = ["objective.variant=consistency", f"backbone.views.{option}"]
        toy_recipe(TOYS, "classifier", "ducat", "plain", *other)  # which trains on both views


def test_augmentation_does_nothing_on_a_data_set_that_has_none() -> None:
    for option in ("augment_pos=true", "augment_x=false"):
        with pytest.raises(ConfigError, match=r"does nothing on this data set, which has no aug"):
            resolve(REGISTRY, overrides=["backbone.use=sadajem", f"backbone.views.{option}"])
    resolve(REGISTRY, overrides=["backbone.views.augment_pos=true", "data.use=svhn"])


def test_what_lower_layers_say_may_be_said_again_and_may_have_nothing_to_do() -> None:
    named = {"data": {"use": "digits"}, "backbone": {"use": "jem"}}
    first = resolve(REGISTRY, named=named, overrides=["objective.w2=0"])
    assert first.tables["schedule"]["at"] == [0.5, 0.75]  # of the objective; the decay is a cosine
    assert first.tables["objective"]["outer"] == "squared"
    again = resolve(REGISTRY, config=json.loads(json.dumps(first.tables)))
    assert again.tables == first.tables


def test_the_config_of_a_run_is_read_whatever_it_says(tmp_path: Path) -> None:
    table = resolve(REGISTRY).tables
    table["schedule"]["floor"] = 0.5
    table["schedule"]["decay"] = "constant"
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"recipe": table}))
    assert resolve(REGISTRY, config=path).tables["schedule"]["floor"] == 0.5
    with pytest.raises(ConfigError, match=r"schedule.floor = 0.5 .*\(from config\)"):
        resolve(REGISTRY, config=table)


def test_a_preset_warns_of_what_other_settings_leave_without_effect(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        resolve(REGISTRY, preset="released", overrides=["backbone.network.norm=none"])
    assert "backbone.network.bn_momentum = 0.9 does nothing without batch norm" in caplog.text


def test_a_momentum_is_needed_to_look_ahead_by() -> None:
    with pytest.raises(ConfigError, match="needs a momentum above 0"):
        resolve(REGISTRY, overrides=["optimizer.nesterov=true", "optimizer.momentum=0"])


class Inner(Options):
    """Options inside those of an attack."""

    size: int = 3
    names: list[str] = Field(default_factory=list)


class Outer(Options):
    """A guest's attack, whose options inside others may do nothing."""

    inner: Inner = Inner()
    idle: tuple[str, ...] = ("inner.size", "inner.names")

    def unused(self) -> dict[str, str]:
        return dict.fromkeys(self.idle, "where idle names it")


@pytest.mark.parametrize(("given", "wrong"), [
    ({}, ""), ({"inner": {"size": 3}}, ""), ({"inner": {"names": []}}, ""),
    ({"inner": {"size": 4}}, "guest.inner.size = 4 does nothing where idle names it"),
    ({"inner": {"names": ["a"]}}, "guest.inner.names = ['a'] does nothing"),
    ({"idle": ["inner.lost"]}, "unused names 'inner.lost', which is not one of its options"),
    ({"idle": ["lost.size"]}, "unused names 'lost.size', which is not one of its options"),
])  # fmt: skip
def test_a_guest_may_name_options_inside_others(given: dict[str, Any], wrong: str) -> None:
    part = Outer.model_validate(given)
    if not wrong:
        check_given(part, given, "guest")
        return
    with pytest.raises(ConfigError, match=re.escape(wrong)):
        check_given(part, given, "guest")


EVALUATIONS: list[tuple[str, dict[str, Any], str]] = [
    ("pgd", {"steps": 0, "step_px": 1}, "pgd.step_px = 1.0 does nothing where steps is 0"),
    ("cw", {"steps": 0, "step_px": 1}, "where steps is 0"),
    ("energy", {"steps": 0, "step_px": 1}, "where steps is 0"),
    ("eot", {"steps": 0, "step_px": 1}, "where steps is 0"),
    ("bpda", {"steps": 0, "step_px": 1}, "where steps is 0"),
    ("detector", {"limit": "own", "percentile": 5}, 'unless limit = "percentile"'),
    ("et3", {"step_px": 1}, "where steps is 0"),
    ("robustness", {"indicators": False, "indicator_images": 9}, "where indicators is false"),
    ("generation", {"source": "buffer", "steps": 9}, 'where source = "buffer"'),
    ("generation", {"source": "buffer", "start": "noise"}, 'where source = "buffer"'),
]


@pytest.mark.parametrize(("name", "options", "needs"), EVALUATIONS)
def test_an_option_of_an_evaluation_that_would_do_nothing_is_refused(
    name: str, options: dict[str, Any], needs: str
) -> None:
    attacks = (name,) if name in list(REGISTRY["attack"]) else ("pgd",)
    settings = Settings(attacks=attacks, options={name: options})
    built = attacks_of if name in list(REGISTRY["attack"]) else evaluators_of
    with pytest.raises(ConfigError, match=needs):
        built(settings, REGISTRY)
