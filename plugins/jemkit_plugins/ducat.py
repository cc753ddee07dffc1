"""DUCAT (arXiv 2410.12671): adversarial images are trained towards a dummy class per class."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor, nn

from jemkit import (
    PGD, Attack, Backbone, Batch, Context, EnergyModel, EnergyModelSpec, Evaluator, Figure, Images,
    MisfitError, Network, Objective, ObjectiveSpec, Options, PartOf, PixelModel, Scores, Stream,
    Task, Terms, Unmeasurable, batches, ce_adversary, hookimpl, watched,
)  # fmt: skip
from jemkit.metrics.figures import share

Fold = Literal["lse", "max"]
"""How f[c] and f[c + K] are combined to the logit of class c."""


class Dummies(Options):
    """2K logits, of class c and its dummy c + K, folded to K; E(x) is computed from all 2K."""

    fold: Fold = "lse"

    def build(self, network: Network, n_classes: int) -> EnergyModel:
        return DummyEnergy(network, n_classes, self.fold)


class DummyEnergy(EnergyModel):
    """A head of 2K logits that returns folded logits; with "none" it returns all of them."""

    def __init__(self, network: Network, n_classes: int, fold: Fold) -> None:
        super().__init__()
        self.network = network
        self.head = nn.Linear(network.width, 2 * n_classes)
        self.fold: Fold | Literal["none"] = fold

    @property
    def beside_logits(self) -> str:  # type: ignore[override]
        return (
            f"the model has 2K logits, and attacks see K, folded by {self.fold}: the evaluator "
            "foldings attacks through both foldings"
        )

    def read(self, features: Tensor) -> Scores:
        raw = self.head(features)
        return Scores(raw if self.fold == "none" else folded(raw, self.fold), -raw.logsumexp(1))


def folded(raw: Tensor, fold: Fold = "lse") -> Tensor:
    """Fold logits [B, 2K] to [B, K]."""
    pairs: Tensor = raw.view(len(raw), 2, -1)
    return pairs.logsumexp(1) if fold == "lse" else pairs.amax(1)


def with_dummies(model: EnergyModel) -> DummyEnergy:
    """The model's energy with dummies; raises MisfitError if it has no dummy classes."""
    if not isinstance(model, DummyEnergy):
        raise MisfitError(
            "the objective ducat needs a dummy class for each class: set "
            'backbone.energy.use = "dummies"'
        )
    return model


@contextmanager
def read_as(model: EnergyModel, fold: Fold | Literal["none"]) -> Iterator[None]:
    """Use another folding of the model inside the block."""
    folded = with_dummies(model)
    before, folded.fold = folded.fold, fold
    try:
        yield
    finally:
        folded.fold = before


class DUCAT(Options):
    """PGD-AT with 2K classes; late in training x~ is labelled with its dummy, x partly.

    From the step of `start` on, targets are (1 - b) e_y + b e_(y + K) with b = `clean_dummy` for x
    and `adv_dummy` for x~. Those of x~ are multiplied by `adv_mass`; the loss is the mean over
    both. As in the released code, the attack is on the 2K logits.
    """

    needs_density: ClassVar[bool] = False

    start: float = Field(0.8, ge=0, le=1)  # fraction of the run: 104 of 130 epochs
    clean_dummy: float = Field(0.25, ge=0, le=1)
    adv_dummy: float = Field(1.0, ge=0, le=1)
    adv_mass: float = Field(1.0, gt=0)
    attack: Annotated[Attack, PartOf("attack")] = PGD(steps=10)

    def unused(self) -> dict[str, str]:
        idle = ("clean_dummy", "adv_dummy", "adv_mass")
        return dict.fromkeys(idle, "where start is 1") if self.start == 1 else {}

    def build(self, task: Task, rng: Generator) -> Objective[Any]:
        return DUCATObjective(self, task.total_steps)


class DUCATObjective:
    """The objective at a step: knows whether the dummy labels have begun."""

    needs_density: ClassVar[bool] = False
    streams: ClassVar[tuple[Stream, ...]] = ("x", "x_adv")

    def __init__(self, options: DUCAT, total_steps: int) -> None:
        self.options, self.total_steps = options, total_steps

    def check_backbone(self, backbone: Backbone) -> None:
        with_dummies(backbone.model)

    def draw(self, backbone: Backbone, batch: Batch, rng: Generator) -> Tensor:
        with read_as(backbone.model, "none"):
            return ce_adversary(self.options.attack, backbone, batch.x, batch.y, rng)

    def loss(self, backbone: Backbone, batch: Batch, x_adv: Tensor) -> Terms:
        o, y = self.options, batch.y
        late = batch.step >= o.start * self.total_steps
        images: dict[Stream, Tensor] = {"x": batch.x} if late else {}
        fold: Fold = "max" if with_dummies(backbone.model).fold == "max" else "lse"
        with read_as(backbone.model, "none"):
            raw = backbone.scores({**images, "x_adv": x_adv})
        adv = raw["x_adv"].logits
        if late:
            clean = raw["x"].logits
            of_clean = F.cross_entropy(clean, target(clean, y, o.clean_dummy))
            of_adv = o.adv_mass * F.cross_entropy(adv, target(adv, y, o.adv_dummy))
            terms = {"p(y|x)": (0.5, of_clean), "p(y|x~)": (0.5, of_adv)}
        else:
            terms = {"p(y|x~)": (1.0, F.cross_entropy(adv, y))}
        scores = {name: Scores(folded(s.logits, fold), s.energy) for name, s in raw.items()}
        return Terms.weighted(terms, watched(scores, y))


def target(raw: Tensor, y: Tensor, dummy: float) -> Tensor:
    """Targets with 1 - b on class y and b on its dummy, [B, 2K]."""
    label = torch.zeros_like(raw).scatter(1, y[:, None], 1 - dummy)
    return label.scatter_add(1, y[:, None] + raw.shape[1] // 2, torch.full_like(raw[:, :1], dummy))


class Foldings(Options):
    """Accuracy under PGD of a model with dummy classes, for each folding and on all 2K logits.

    An attack on 2K logits is misled: it counts the dummy of the true class as a success.
    """

    steps: int = Field(20, ge=0)

    def __call__(self, subject: PixelModel, data: Images, ctx: Context) -> list[Figure]:
        model = subject.model
        if not isinstance(model, DummyEnergy):
            raise Unmeasurable("the model has no dummy classes to fold")
        pgd, figures = PGD(steps=self.steps), []
        (perturb,) = pgd.bind(subject, ctx.threat).values()
        card = {**ctx.card, **pgd.card(ctx.threat, model.head.out_features // 2)}
        for attacked, judged in JUDGED.items():
            right = []
            for x, y in batches(data, ctx, f"{pgd.label} on folding {attacked}"):
                with read_as(model, attacked):
                    x_adv = perturb(x, y, ctx.rng)
                with read_as(model, judged), torch.no_grad():
                    right.append((subject(x_adv).argmax(1) == y).cpu())
            name, rows = f"{pgd.label}_{attacked}", torch.cat(right)
            how = {"attacked": attacked, "folded": judged}
            figures.append(share(name, int(rows.sum()), len(rows), {**card, **how}))
        return figures


JUDGED: dict[Fold | Literal["none"], Fold] = {"lse": "lse", "max": "max", "none": "max"}
"""The loss of an attack, and the folding with which its images are classified."""


@hookimpl
def jemkit_energy_models() -> Mapping[str, type[EnergyModelSpec]]:
    return {"dummies": Dummies}


@hookimpl
def jemkit_objectives() -> Mapping[str, type[ObjectiveSpec]]:
    return {"ducat": DUCAT}


@hookimpl
def jemkit_evaluators() -> Mapping[str, type[Evaluator]]:
    return {"foldings": Foldings}
