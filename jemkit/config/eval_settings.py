"""Settings of an evaluation: what its figures depend on besides the model."""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, ValidationError

from jemkit.attacks.base import Norm, Threat, check_width, radius_of
from jemkit.config.layers import merged, override_layers
from jemkit.config.messages import explain
from jemkit.config.registry import Registry
from jemkit.config.unused import check_given
from jemkit.data import Images
from jemkit.errors import ConfigError
from jemkit.metrics.evaluator import AnyAttack, Evaluator
from jemkit.options import Options, Radius, nearest
from jemkit.runtime.precision import JUDGED_IN
from jemkit.runtime.run_dir import versions
from jemkit.runtime.work_cache import tensors_hash
from jemkit.selection import Part, Selection

ORDER = ("accuracy", "robustness", "energies", "calibration", "ood", "generation")
"""The order of the evaluators; those of other plug-ins follow."""


RELEASED_STEP_PX = 0.5  # in EB-JDAT's evaluator: 1/255 of [-1, 1], half of that on [0, 1] images


Names = Annotated[
    tuple[str, ...], BeforeValidator(lambda names: (names,) if isinstance(names, str) else names)
]
"""Names of parts; a single string is allowed."""


class Settings(Options):
    """How a model is evaluated: everything that a record's figures depend on besides the model."""

    attacks: Names = ()  # none: pgd and aa, or pgd alone with --quick
    norm: Norm = "Linf"
    eps_px: Radius | None = None  # None: the data set's, which is L-inf
    max_images: int | None = Field(None, ge=1)  # a subset of the test images; None: all
    selection: Selection = "stratified"  # how the subset is drawn; first: as in RobustBench
    batch_size: int = Field(250, ge=1)  # AutoAttack's; the result of a seed depends on it
    seed: int = Field(0, ge=0, lt=2**32)
    protocol: Literal["standard", "released"] = "standard"
    quick: bool = False
    refine_steps: int = Field(0, ge=0)  # k of JEM-k: steps of SGLD before an image is classified
    only: Names = ()  # evaluators; none: all
    skip: Names = ()
    options: dict[str, dict[str, Any]] = Field(default_factory=dict)  # of an attack or evaluator


def settings_of(values: Mapping[str, Any]) -> Settings:
    """Settings, or a ConfigError that says which of them are invalid."""
    try:
        parsed = Settings.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError(explain(error, dict.fromkeys(Settings.model_fields))) from None
    if parsed.selection == "first" and not (parsed.quick or parsed.max_images):
        raise ConfigError(
            "selection = first selects a subset of the images, but all of them are evaluated: "
            "set --max-images, or omit it"
        )
    return parsed


def options_of(overrides: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The options of attacks and evaluators in texts such as pgd.steps=50."""
    by_evaluator: dict[str, dict[str, Any]] = {}
    for layer in override_layers(overrides):
        for name, options in layer.table.items():
            if not isinstance(options, dict):
                raise ConfigError(
                    f"{layer.origin}: expected NAME.OPTION=VALUE, such as pgd.steps=50"
                )
            by_evaluator[name] = merged(by_evaluator.get(name, {}), options)
    return by_evaluator


def threat_of(settings: Settings, default_px: float, pixels: int) -> Threat:
    """Norm and radius of every attack; the released protocol halves the default radius."""
    if settings.protocol == "released" and settings.norm != "Linf":
        raise ConfigError(
            f"the released protocol is defined for the norm Linf only: for {settings.norm} omit "
            f"--protocol released"
        )
    usual = default_px / 2 if settings.protocol == "released" else default_px
    radius = radius_of(settings.norm, settings.eps_px, usual, "--eps-px")
    threat = Threat(settings.norm, radius)
    check_width(threat, pixels, "--eps-px")
    return threat


def protocol_card(
    settings: Settings,
    threat: Threat,
    about: Mapping[str, Any],
    part: Part,
    test: Images,
    device: torch.device,
) -> dict[str, Any]:
    """The entries for every figure of an evaluation of a subset of the test images.

    `about` is the description of the model.
    """
    data, whole = part.images, part.text == "all"
    judged = tensors_hash(data._asdict())
    return {
        "protocol": settings.protocol,
        "standard": settings.protocol == "standard" and whole and not settings.quick,
        "split": "test",
        "images": len(data.y),
        "image_px": data.x.shape[-1],
        "selection": part.text,
        "quick": settings.quick,
        "seed": settings.seed,
        "batch_size": settings.batch_size,
        "norm": threat.norm,
        "radius_px": threat.radius_px,
        "trained_radius_px": about.get("trained_radius_px"),
        **{k: v for k, v in about.items() if k == "trained_norm"},
        "checkpoint": about.get("sha256"),
        "data_sha256": judged,
        "test_sha256": judged if whole else tensors_hash(test._asdict()),
        "versions": versions(),
        "device": device.type,
        "precision": JUDGED_IN,
    }


def attacks_of(settings: Settings, registry: Registry) -> dict[str, AnyAttack]:
    """The requested attacks, with their options."""
    default = ("pgd",) if settings.quick else ("pgd", "aa")
    names = dict.fromkeys(settings.attacks or default)
    usual: dict[str, dict[str, Any]] = {"pgd": {"steps": 20}}
    if settings.protocol == "released":
        usual["aa"] = {"version": "released"}
        usual["pgd"]["step_px"] = RELEASED_STEP_PX
    options = {n: {**usual.get(n, {}), **settings.options.get(n, {})} for n in names}
    return {name: _built(registry, "attack", name, options) for name in names}


def evaluators_of(settings: Settings, registry: Registry) -> dict[str, Evaluator]:
    """The requested evaluators, clean accuracy first."""
    shelf = registry["evaluator"]
    for name in (*settings.only, *settings.skip):
        shelf[name]
    rest = [name for name in shelf if name not in ORDER]
    selected = {*settings.only, "accuracy"} if settings.only else set(shelf)
    names = [n for n in (*ORDER, *rest) if n in selected and n not in settings.skip]
    attacks = attacks_of(settings, registry)
    attacking = any(getattr(registry["evaluator"][name], "runs_attacks", True) for name in names)
    _check_options(settings, registry, [*attacks, *names] if attacking else names)
    return {name: _built(registry, "evaluator", name, settings.options) for name in names}


def _check_options(settings: Settings, registry: Registry, running: list[str]) -> None:
    known = [*registry["attack"], *registry["evaluator"]]
    for name in settings.options:
        if name not in known:
            raise ConfigError(
                f"no attack or evaluator {name!r} to set options of{nearest(name, known)}"
            )
        if name not in running:
            there = ", ".join(running)
            raise ConfigError(
                f"options of {name!r} are set, but it does not run; running are {there}"
            )


def _built(
    registry: Registry, kind: str, name: str, options: Mapping[str, Mapping[str, Any]]
) -> Any:
    part = registry[kind][name]
    given = dict(options.get(name, {}))
    try:
        built = part.model_validate(given, context=registry.context)
    except ValidationError as error:
        raise ConfigError(
            f"{kind} {name}: {explain(error, dict.fromkeys(part.model_fields))}"
        ) from None
    check_given(built, given, name)
    return built
