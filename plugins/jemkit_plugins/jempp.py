"""JEM++ (Yang and Ji, ICCV 2021): chains by proximal YOPO-Langevin dynamics, informative start."""

from collections.abc import Mapping

from jemkit import PYLD, BackboneSpec, JEMVariant, SamplerPart, Table, Views, hookimpl


class JEMPP(JEMVariant):
    """A WideResNet with batch norm, 10 steps of PYLD from class-wise Gaussians, noisy inputs."""

    sampler: SamplerPart = PYLD(inner_steps=5, step_size=0.2, clip=1.0)
    views: Views = Views(noise_x=0.03, noise_pos=0.03)


@hookimpl
def jemkit_backbones() -> Mapping[str, type[BackboneSpec]]:
    return {"jempp": JEMPP}


@hookimpl
def jemkit_recipes() -> Mapping[str, Table]:
    return {
        "backbone/jempp": {
            "optimizer": {"use": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 4e-4},
            "updater": {"use": "plain"},
            "schedule": {"decay": "steps", "at": [1 / 3, 2 / 3, 5 / 6], "by": 0.2},
            "run": {"epochs": 150, "batch_size": 64},
        }
    }
