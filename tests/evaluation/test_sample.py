"""Chains of `sample` run in the precision of their run; what is judged is judged in fp32."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toys import toy_recipe, toy_registry

from jemkit import Network, Options, hookimpl, train
from jemkit.config.eval_settings import settings_of
from jemkit.config.registry import Plugin, Registry
from jemkit.data import Shape
from jemkit.evaluation.evaluate import judge
from jemkit.evaluation.sample import sample
from jemkit.evaluation.subjects import subject_at
from jemkit.models.networks import SmallCNN

RECORDED: list[dict[str, Any]] = []
"""How torch stood in every pass of a witness."""


class Witness(Network):
    """A small network that notes the switches that it is passed under."""

    def __init__(self, inner: Network) -> None:
        super().__init__()
        self.inner, self.width = inner, inner.width

    def stem(self, x: Tensor) -> Tensor:
        RECORDED.append(
            {
                "tf32": torch.backends.cudnn.conv.fp32_precision == "tf32",
                "bf16": torch.is_autocast_enabled("cpu"),
                "deterministic": torch.are_deterministic_algorithms_enabled(),
                "threads": torch.get_num_threads(),
            }
        )
        return self.inner.stem(x)

    def trunk(self, h: Tensor) -> Tensor:
        return self.inner.trunk(h)


class Watching(Options):
    """Options of a witness."""

    def build(self, shape: Shape) -> Network:
        return Witness(SmallCNN(channels=2, norm="batch").build(shape))


class WitnessPlugin:
    @staticmethod
    @hookimpl
    def jemkit_networks() -> dict[str, Any]:
        return {"witness": Watching}


def trained(out: Path, precision: str) -> Registry:
    registry = toy_registry([Plugin("witness", WitnessPlugin)])
    settings = [f"run.precision={precision}", "run.deterministic=true", "run.threads=1"]
    recipe = toy_recipe(
        registry, "sadajem", "jem", "plain", "backbone.network.use=witness", "run.epochs=1",
        *settings,
    )  # fmt: skip
    RECORDED.clear()
    train(recipe, out, registry=registry)
    return registry


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_chains_are_drawn_by_the_switches_that_the_run_was_trained_by(
    precision: str, tmp_path: Path
) -> None:
    registry = trained(tmp_path / "run", precision)
    wanted = {"tf32": precision == "tf32", "bf16": precision == "bf16"}
    wanted |= {"deterministic": True, "threads": 1}
    assert wanted in RECORDED
    RECORDED.clear()
    samples = sample(tmp_path / "run", registry=registry, n=4, steps=2, device="cpu")
    assert [recorded for recorded in RECORDED if recorded != wanted] == []
    assert RECORDED
    said = {"precision": precision, "deterministic": True, "threads": 1}
    assert said.items() <= samples.protocol.items()


def test_validation_the_last_judgement_and_evaluate_are_all_in_fp32(tmp_path: Path) -> None:
    registry = trained(tmp_path / "run", "tf32")
    by_tf32 = [recorded["tf32"] for recorded in RECORDED]
    assert by_tf32[0]  # the first step
    assert not by_tf32[-1]  # the last judgement
    changes = sum(a != b for a, b in itertools.pairwise(by_tf32))
    assert changes == 1  # at the epoch's end
    RECORDED.clear()
    subject = subject_at(tmp_path / "run", registry, torch.device("cpu"))
    record = judge(subject, settings_of({"attacks": ("pgd",), "only": ("accuracy",)}), registry)
    assert not any(recorded["tf32"] for recorded in RECORDED)
    assert record.figure("clean").protocol["precision"] == "fp32"


def test_a_model_is_judged_in_fp32_in_the_midst_of_an_autocast(tmp_path: Path) -> None:
    registry = trained(tmp_path / "run", "fp32")
    subject = subject_at(tmp_path / "run", registry, torch.device("cpu"))
    requested = settings_of({"attacks": ("pgd",), "only": ("accuracy",)})
    RECORDED.clear()
    with torch.autocast("cpu", torch.bfloat16):
        judge(subject, requested, registry)
        assert torch.is_autocast_enabled("cpu")
    assert RECORDED
    assert not any(recorded["bf16"] for recorded in RECORDED)
