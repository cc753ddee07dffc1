"""M-EBM (Yang and Ji, PAKDD 2023): a separate energy head, chains from a single Gaussian."""

from collections.abc import Mapping

from jemkit import (
    BackboneSpec, Contrastive, DensityPart, EnergyPart, Gaussian, JEMVariant, LinearHead,
    StartPart, Steps, Table, hookimpl,
)  # fmt: skip


class MEBM(JEMVariant):
    """A density by an energy head, 5 steps of SGLD; with the objective `jem` it is M-JEM."""

    energy: EnergyPart = LinearHead()
    density: DensityPart = Contrastive(penalty=0.5, penalty_on="positives")
    start: StartPart = Gaussian()
    steps: Steps = 5  # M: sampler steps of a chain per training step


@hookimpl
def jemkit_backbones() -> Mapping[str, type[BackboneSpec]]:
    return {"mebm": MEBM}


@hookimpl
def jemkit_recipes() -> Mapping[str, Table]:
    return {
        "backbone/mebm": {
            "optimizer": {"use": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4},
            "updater": {"use": "plain"},
            "schedule": {"decay": "steps", "at": [0.3, 0.6, 0.9], "by": 0.2},
            "run": {"epochs": 200, "batch_size": 128},
        }
    }
