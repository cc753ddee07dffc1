"""SADA-JEM (Yang, Su and Ji, CVPR 2023): SAM, and a density of images without augmentation."""

from collections.abc import Mapping

from jemkit import SGLD, BackboneSpec, JEMVariant, SamplerPart, Table, Views, hookimpl


class SADAJEM(JEMVariant):
    """A WideResNet with batch norm, 10 noise-free steps of clamped SGLD, class-wise Gaussians."""

    sampler: SamplerPart = SGLD(step_size=1.0, noise=0.0, clip=1.0)
    views: Views = Views(augment_pos=False, pos_share=0.5)


@hookimpl
def jemkit_backbones() -> Mapping[str, type[BackboneSpec]]:
    return {"sadajem": SADAJEM}


@hookimpl
def jemkit_recipes() -> Mapping[str, Table]:
    return {
        "backbone/sadajem": {
            "optimizer": {"use": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4},
            "updater": {"use": "sam", "rho": 2.0, "adaptive": True},
            "schedule": {"decay": "steps", "at": [0.3, 0.6, 0.9], "by": 0.2},
            "run": {"epochs": 200, "batch_size": 128},
        }
    }
