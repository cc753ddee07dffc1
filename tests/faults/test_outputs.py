"""Heads of a classifier, searched: what is not logits is refused or flagged, and logits pass."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor, nn
from toys import REGISTRY

import jemkit
from jemkit import Images, MisfitError
from jemkit.attacks.pixel_model import pixel_model
from jemkit.metrics.outputs import probe_outputs
from jemkit.metrics.record_file import Record
from jemkit.models.networks import seeded_init

CPU = torch.device("cpu")
Head = Callable[[Tensor], Tensor]


class Headed(nn.Module):
    """A classifier with something behind its logits."""

    def __init__(self, body: nn.Module, head: Head) -> None:
        super().__init__()
        self.body, self.head = body, head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


@cache
def images(classes: int) -> Images:
    y = torch.arange(60) % classes
    noise = torch.rand(60, 3, 8, 8, generator=Generator().manual_seed(0))
    return Images((noise * 0.3 + y.view(-1, 1, 1, 1) / (1.5 * classes)).clamp(0, 1), y)


@cache
def body(classes: int, steps: int, seed: int = 0) -> nn.Module:
    """A small network after so many steps of training; 0 is at its initialisation."""
    with seeded_init(Generator().manual_seed(seed)):
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(128, classes)
        )
    optimizer, data = torch.optim.Adam(model.parameters(), 1e-2), images(classes)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(data.x), data.y).backward()
        optimizer.step()
    return model.eval()


def noisy_softmax(size: float) -> Head:
    def head(z: Tensor) -> Tensor:
        noise = torch.randn(z.shape, generator=Generator().manual_seed(1))
        return z.softmax(1) + size * noise

    return head


classes = st.sampled_from([2, 3, 10, 50])
steps = st.sampled_from([0, 30, 150])
scales = st.floats(0.2, 100)
temperatures = st.floats(-8, 8).map(lambda power: 10**power)

no_logits: st.SearchStrategy[Head] = st.one_of(
    scales.map(lambda c: lambda z: c * torch.sigmoid(z)),
    scales.map(lambda c: lambda z: c * torch.tanh(z)),
    scales.map(lambda c: lambda z: c * F.softsign(z)),
    scales.map(lambda c: lambda z: c * z.softmax(1)),
    scales.map(lambda c: lambda z: c * F.normalize(z, dim=1)),
    st.floats(0.1, 3).map(lambda c: lambda z: z.clamp(-c, c)),
    st.floats(-5, 5).map(lambda c: lambda z: c + torch.sigmoid(z)),
    st.floats(0, 0.005).map(noisy_softmax),
    st.floats(0.995, 1.005).map(lambda c: lambda z: c * z.softmax(1)),
    st.sampled_from([torch.bfloat16, torch.float16]).map(lambda d: lambda z: z.softmax(1).to(d)),
    st.just(lambda z: F.one_hot(z.argmax(1), z.shape[1]).float() + 0 * z),
    st.just(lambda z: F.hardsigmoid(z)),
)
logits: st.SearchStrategy[Head] = st.one_of(
    temperatures.map(lambda t: lambda z: z / t),
    temperatures.map(lambda t: lambda z: (z / t).log_softmax(1)),
    st.floats(-100, 100).map(lambda c: lambda z: z + c),
    st.floats(-3, 3).map(lambda c: lambda z: z - z.mean(1, keepdim=True) + c),
    st.sampled_from([torch.bfloat16, torch.float16]).map(lambda d: lambda z: z.to(d)),
)


def flag_of(model: nn.Module, data: Images) -> str:
    """What becomes of a model: "refused", "not logits", "flagged" for another reason, or ""."""
    try:
        probe = probe_outputs(pixel_model(model), data, CPU)
    except MisfitError:
        return "refused"
    if probe.bounded:
        assert probe.finding["flag"]
        return "not logits"
    return "flagged" if probe.finding["flag"] else ""


@settings(max_examples=60)
@given(k=classes, steps=steps, head=no_logits)
def test_a_head_that_gives_no_logits_is_refused_or_flagged(k: int, steps: int, head: Head) -> None:
    assert flag_of(Headed(body(k, steps), head), images(k)) in ("refused", "not logits")


@settings(max_examples=60)
@given(k=classes, steps=steps, head=logits)
def test_logits_at_any_temperature_pass_for_logits(k: int, steps: int, head: Head) -> None:
    assert flag_of(Headed(body(k, steps), head), images(k)) in ("", "flagged")


@settings(max_examples=20)
@given(k=classes, steps=steps, t=st.floats(0.5, 1e4))
def test_logits_that_the_loss_can_take_are_not_flagged_at_all(k: int, steps: int, t: float) -> None:
    assert not flag_of(Headed(body(k, steps), lambda z: z / t), images(k))


@pytest.mark.parametrize("factor", [1e3, 1e6])
def test_logits_so_large_that_gradients_vanish_are_flagged(factor: float) -> None:
    assert flag_of(Headed(body(10, 150), lambda z: factor * z), images(10)) == "flagged"


@pytest.mark.parametrize("custom", [
    lambda z: 1 / (1 + (-z).exp()), lambda z: z / (1 + z.abs()), lambda z: z / (1 + z * z).sqrt(),
    lambda z: z.exp() / z.exp().sum(1, keepdim=True),
    lambda z: torch.where(z > 0, 1.0, -1.0) + 0 * z,
])  # fmt: skip
def test_a_bounded_head_of_ones_own_is_detected_by_what_it_does(custom: Head) -> None:
    assert flag_of(Headed(body(10, 30), custom), images(10)) in ("refused", "not logits")


class Cosine(nn.Module):
    """Logits that are cosines of features and weights."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        with seeded_init(Generator().manual_seed(0)):
            self.features = nn.Sequential(nn.Flatten(), nn.Linear(192, 16))
            self.weight = nn.Parameter(torch.randn(10, 16, generator=Generator().manual_seed(0)))
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        features, weight = F.normalize(self.features(x), dim=1), F.normalize(self.weight, dim=1)
        return self.scale * F.linear(features, weight)


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_cosines_are_flagged_and_not_refused(scale: float) -> None:
    assert flag_of(Cosine(scale), images(10)) == "not logits"


class InRange(nn.Module):
    """A classifier that refuses what no image can be."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        if x.min() < -0.1 or x.max() > 1.1:
            raise ValueError("images lie in [0, 1]")
        logits: Tensor = self.inner(x)
        return logits


def test_a_model_that_takes_images_alone_is_judged_as_any_other() -> None:
    assert not flag_of(InRange(body(10, 30)), images(10))
    assert flag_of(InRange(Headed(body(10, 30), torch.sigmoid)), images(10)) == "not logits"


def test_a_run_of_every_backbone_gives_logits_at_its_initialisation() -> None:
    from jemkit.testing import toy_model, toy_task

    task = toy_task()
    model = pixel_model(toy_model(task), task.bounds)
    assert not probe_outputs(model, task.images("valid"), CPU).finding["flag"]


@pytest.mark.parametrize("attacks", [("pgd",), ("square",), ("fgsm", "pgd")])
@pytest.mark.parametrize("indicators", [True, False])
def test_outputs_that_are_no_logits_are_reported_with_every_figure_whatever_attacks(
    attacks: tuple[str, ...], indicators: bool
) -> None:
    options = {"robustness": {"indicators": indicators}, "square": {"queries": 5}}
    options = {k: v for k, v in options.items() if k in (*attacks, "robustness")}
    record = judged(torch.sigmoid, attacks, options)
    for figure in record.figures:
        if figure.name == "clean":
            assert figure.protocol["standard"]
            continue
        assert not figure.protocol["standard"]
        assert "the outputs are not logits" in figure.protocol["why"]
        rows = record.tables["indicators"][figure.name]
        assert next(row for row in rows if row["name"] == "outputs")["flag"]
    assert any(warning.startswith("outputs: ") for warning in record.warnings)


def judged(head: Head, attacks: tuple[str, ...], options: dict[str, dict[str, bool]]) -> Record:
    data = images(3).take(torch.arange(12))
    settings = {"attacks": attacks, "options": options, "only": "robustness", "n_classes": 3}
    return jemkit.evaluate(Headed(body(3, 30), head), data, registry=REGISTRY, **settings)  # type: ignore[arg-type]


def test_log_probabilities_are_logits() -> None:
    options = {"robustness": {"indicators": False}}
    record = judged(lambda z: z.log_softmax(1), ("pgd",), options)
    assert record.figure("pgd20").protocol["standard"]
    assert not record.warnings
    assert record.value("pgd20") == judged(lambda z: z, ("pgd",), options).value("pgd20")
