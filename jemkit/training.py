"""Training: one step of any objective on any backbone, and the flat loop around it."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn

from jemkit import checkpoint
from jemkit.backbone import Backbone, Task
from jemkit.data import Images, Loader, Splits, checked
from jemkit.distance import Distance
from jemkit.errors import DataError, Diverged, MisfitError, Preempted
from jemkit.evaluation import Accuracy, Context, EnergyGap, Figure, PixelModel, Robustness, evaluate
from jemkit.objective import Batch, Objective, ObjectiveSpec, Remembering, Terms
from jemkit.pictures import save_curves, save_grid
from jemkit.recipe import Recipe, Resolved, complete
from jemkit.registry import Registry
from jemkit.runtime.folder import RunFolder, versions
from jemkit.runtime.numerics import InPrecision, device_of, laid_out, numerics
from jemkit.starts import Start, images_hash
from jemkit.update import EMA, Guard, Updater

Watch = Callable[[str, dict[str, Any]], None]
"""Told of "start", "step", "epoch" and "end", with what there is to show."""

GATHER = 20
"""Steps between two readings of the metrics from the device."""

GRID = 100
"""Images in an epoch's sample grid, from fresh chains of GRID_STEPS."""

GRID_STEPS = 40


def check(backbone: Backbone, objective: Objective[Any]) -> None:
    """Refuse, before the first step, parts that do not fit each other."""
    if objective.needs_density and not backbone.has_density:
        name = type(objective).__name__
        raise MisfitError(
            f"the objective {name} learns p(x), and this backbone has no density; "
            "choose another backbone (jem, jempp, mebm, sadajem) or an objective that needs none "
            "(ce, pgdat, trades)"
        )
    if backbone.has_density:
        sampler, network = backbone.density.sampler, backbone.model.network
        if sampler.needs_stem and not network.has_stem:
            raise MisfitError(
                f"the sampler {type(sampler).__name__} differentiates through the first layer "
                "alone, and this network, an adapted module, has no stem to split off; choose "
                "another sampler, such as sgld"
            )


def train_step(
    backbone: Backbone,
    objective: Objective[Any],
    updater: Updater,
    batch: Batch,
    rng: Generator,
    guard: Guard,
    theta_steps: int = 1,
) -> Terms:
    """Draw once, then move the weights `theta_steps` times (M_theta) on what was drawn.

    A step is a transaction: where it fails, the buffer and the generator are as before it.
    """
    before = rng.get_state()
    if backbone.has_density:
        backbone.density.mark()
    seen: list[Terms] = []
    try:
        draws = objective.draw(backbone, batch, rng)

        def terms() -> Terms:
            seen.append(objective.loss(backbone, batch, draws))
            return seen[-1]

        for _ in range(theta_steps):
            updater.step(terms, guard)
    except BaseException:
        if backbone.has_density:
            backbone.density.rollback()
        rng.set_state(before)
        raise
    if isinstance(objective, Remembering):
        objective.after(backbone, batch, draws, rng)
    return seen[0]


class Summary(NamedTuple):
    """How a run ended."""

    run: Path
    epochs: int
    best_epoch: int
    seconds: float
    figures: list[Figure]

    def value(self, name: str) -> float:
        """A figure's value by its name."""
        return next(figure.value for figure in self.figures if figure.name == name)


class Trainer:
    """A run: everything that a recipe determines, and the loop over its steps."""

    def __init__(self, resolved: Resolved, folder: RunFolder, watch: Watch | None = None) -> None:
        self.recipe: Recipe = resolved.recipe
        self.folder, self.watch = folder, watch or (lambda kind, what: None)
        self.stop: Callable[[], bool] = lambda: False  # polled between steps
        run = self.recipe.run
        self.device = device_of(run.device)
        self.splits = Splits(
            self.recipe.data, valid_fraction=run.valid_fraction, max_train=run.max_train
        )
        self.task = task_of(self.recipe, self.splits)
        self.rng = Generator(self.device).manual_seed(run.seed)
        self.backbone = self.recipe.backbone.build(self.task, self.rng)
        self.objective = self._objective()
        check(self.backbone, self.objective)
        check_sizes(self.recipe, self.task)
        model = laid_out(self.backbone.model, run.channels_last, self.device)
        parameters = [*model.parameters()]
        if isinstance(self.objective, Remembering):
            parameters += self.objective.parameters()
        fused = self.device.type == "cuda"
        self.optimizer = self.recipe.optimizer.build(parameters, fused=fused)
        self.updater = self.recipe.updater.build(model, self.optimizer)
        self.ema = EMA(model, run.ema_decay) if run.ema_decay else None
        self.guard = Guard()
        self.loader = Loader(
            self.splits.images("train").to(self.device),
            run.batch_size,
            Generator(self.device).manual_seed(run.seed + 2**32),  # apart from the sampler's
            views=self.backbone.views,
            bounds=self.task.bounds,
            augmentation=self.task.augmentation,
        )
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {}
        self.seconds = 0.0
        self._rows: list[tuple[dict[str, Any], list[str], Tensor]] = []
        if run.compile:
            model.compile()

    @property
    def step(self) -> int:
        """Steps done."""
        return self.loader.step

    @property
    def total_steps(self) -> int:
        return self.task.total_steps

    def run(self, until: int | None = None) -> None:
        """Train to the end of the recipe, or until `until` steps are done; then save."""
        run, last = self.recipe.run, min(until or self.total_steps, self.total_steps)
        self.watch("start", {"step": self.step, "total": self.total_steps, "epochs": run.epochs})
        self.backbone.model.train()
        with numerics(precision=run.precision, deterministic=run.deterministic):
            try:
                while self.step < last:
                    if self.stop():
                        raise Preempted(f"stopped at step {self.step}; go on with --resume")
                    self.one_step()
                    if self.step % self.loader.steps_per_epoch == 0:
                        self.end_epoch()
                self.save()
            except Preempted:
                self.save()
                self.folder.event("preempted", step=self.step)
                raise
            except Diverged as error:
                raise self._diverged(error) from None

    def one_step(self) -> None:
        """Schedule, draw, update, log."""
        began = time.perf_counter()
        step, run = self.step, self.recipe.run
        factor = self.recipe.schedule.factor(step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.optimizer.lr * factor
        batch = self.loader.batch()
        terms = train_step(
            self.backbone,
            self.objective,
            self.updater,
            batch,
            self.rng,
            self.guard,
            run.theta_steps,
        )
        if self.ema is not None:
            self.ema.update(self.backbone.model)
        spent = time.perf_counter() - began
        self.seconds += spent
        self._note(step, factor, terms, len(batch.y) / spent)
        if self.step % GATHER == 0 or self.step == self.total_steps:
            self.gather()

    def end_epoch(self) -> None:
        """Validate, draw a sample grid, keep the best, save."""
        self.guard.settle()
        self.gather()
        epoch = self.step // self.loader.steps_per_epoch
        found = self.validate(epoch)
        entry = {"epoch": epoch, "step": self.step, **found, "seconds": round(self.seconds, 3)}
        self.history.append(entry)
        score = [found["pgd10"], found["accuracy"], epoch]
        if not self.best or score > self.best["score"]:
            self.best = {"epoch": epoch, "score": score}
            checkpoint.save(self.folder.checkpoints / "best", self.state_dict())
        self.draw_grid(epoch)
        self.save()
        self.folder.event("epoch", **entry)
        save_curves(self.folder.path / "curves.png", self.folder.metrics(), self.history)
        self.watch("epoch", entry)

    def validate(self, epoch: int) -> dict[str, float]:
        """Validation accuracy, and under PGD-10 on a part; of the averaged weights where kept."""
        valid = self.splits.images("valid")
        part = Images(
            valid.x[: self.recipe.run.eval_images], valid.y[: self.recipe.run.eval_images]
        )
        ctx = Context(self._generator(epoch, "validate"), self.task.radius_px)
        with self._averaged():
            subject = PixelModel(self.backbone.model, self.task.bounds)
            (clean,) = evaluate(subject, valid, [Accuracy()], ctx)
            (robust,) = evaluate(subject, part, [Robustness(steps=10)], ctx)
        return {"accuracy": clean.value, "pgd10": robust.value}

    def draw_grid(self, epoch: int) -> None:
        """Fresh chains of the live weights, a row a class where the start knows classes."""
        if not self.backbone.has_density:
            return
        density, k = self.backbone.density, self.task.n_classes
        y = (torch.arange(GRID, device=self.device) * min(k, 10) // GRID) % k
        rng = self._generator(epoch, "grid")
        start = Labelled(density.start, y)
        x = density.sample(self.backbone.model, GRID, rng, steps=GRID_STEPS, start=start)
        save_grid(self.folder.samples / f"epoch-{epoch:04d}.png", self.task.bounds.to_unit(x))

    def finish(self) -> Summary:
        """Judge the best epoch on the test split, at full size."""
        state = checkpoint.load(self.folder.checkpoints / "best")
        load_model(self.backbone.model, state.get("ema") or state["model"])
        data = self.splits.images("test")
        data = checked(data, self.task.n_classes, "the test split")
        card = {
            "split": "test",
            "images": len(data.y),
            "seed": self.recipe.run.seed,
            "epoch": self.best["epoch"],
            "selection": "best PGD-10 accuracy on validation",
            "versions": versions(),
            "checkpoint": checkpoint.verify(self.folder.checkpoints / "best")[checkpoint.MODEL],
        }
        ctx = Context(self._generator(0, "test"), self.task.radius_px, card=card)
        subject = PixelModel(self.backbone.model, self.task.bounds)
        with numerics(precision="fp32", deterministic=self.recipe.run.deterministic):
            figures = evaluate(subject, data, [Accuracy(), Robustness(), EnergyGap()], ctx)
        summary = Summary(
            self.folder.path, self.recipe.run.epochs, self.best["epoch"], self.seconds, figures
        )
        self.folder.event("end", figures=[f._asdict() for f in figures])
        self.watch("end", {"summary": summary})
        return summary

    def save(self) -> None:
        """A checkpoint of this very step."""
        self.guard.settle()
        self.gather()
        checkpoint.save(self.folder.checkpoints / f"step-{self.step:08d}", self.state_dict())
        checkpoint.prune(self.folder.checkpoints, self.recipe.run.keep)

    def state_dict(self) -> dict[str, Any]:
        density = self.backbone.density if self.backbone.has_density else None
        remembered = self.objective if isinstance(self.objective, Remembering) else None
        return {
            "model": self.backbone.model.state_dict(),
            "ema": self.ema.average if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "density": density.state_dict() if density else None,
            "objective": remembered.state_dict() if remembered else None,
            "loader": self.loader.state_dict(),
            "rng": self.rng.get_state(),
            "history": self.history,
            "best": self.best,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        load_model(self.backbone.model, state["model"])
        if self.ema is not None:
            for name, tensor in self.ema.average.items():
                tensor.copy_(state["ema"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.backbone.has_density:
            self.backbone.density.load_state_dict(state["density"])
        if isinstance(self.objective, Remembering):
            self.objective.load_state_dict(state["objective"])
        self.loader.load_state_dict(state["loader"])
        self.rng.set_state(state["rng"])
        self.history, self.best = list(state["history"]), dict(state["best"])
        self.seconds = state["seconds"]

    def gather(self) -> None:
        """Read the metrics of the last steps from the device, and append them to metrics.csv."""
        if not self._rows:
            return
        values = torch.stack([tensor for _, _, tensor in self._rows]).tolist()
        rows = [
            {**known, **dict(zip(names, read, strict=True))}
            for (known, names, _), read in zip(self._rows, values, strict=True)
        ]
        self._rows = []
        self.folder.append_metrics([with_gaps(row) for row in rows])
        self.watch("step", {"step": self.step, **with_gaps(rows[-1])})

    def _note(self, step: int, factor: float, terms: Terms, rate: float) -> None:
        seen: dict[str, Tensor] = {"loss": terms.total.detach()}
        seen |= {f"loss {name}": part.detach() for name, (_, part) in terms.parts.items()}
        seen |= terms.watched
        if self.guard.seen is not None:
            seen["gradient norm"] = self.guard.seen.grad_norm
        known = {
            "step": step,
            "epoch": step // self.loader.steps_per_epoch + 1,
            "lr": self.recipe.optimizer.lr * factor,
            "images/s": round(rate, 1),
        }
        self._rows.append((known, list(seen), torch.stack([t.float() for t in seen.values()])))

    def _objective(self) -> Objective[Any]:
        found = self.recipe.objective
        built = found.build(self.task, self.rng) if isinstance(found, ObjectiveSpec) else found
        if self.recipe.run.precision == "bf16":
            return InPrecision(built, self.device.type)  # type: ignore[return-value]
        return built

    def _generator(self, epoch: int, name: str) -> Generator:
        """Of its own for every evaluation, from the seed, the epoch and the name."""
        word = int.from_bytes(name.encode()[:4], "big")
        seed = (self.recipe.run.seed * 1_000_003 + epoch) * 2**32 + word
        return Generator(self.device).manual_seed(seed % 2**63)

    def _averaged(self) -> AbstractContextManager[None]:
        if self.ema is None:
            return nullcontext()
        return self.ema.applied(self.backbone.model)

    def _diverged(self, error: Diverged) -> Diverged:
        self._rows = []
        newest = checkpoint.newest(self.folder.checkpoints)
        where = f"the last checkpoint is {newest}" if newest else "there is no checkpoint yet"
        self.folder.event("diverged", step=self.step, reason=str(error))
        return Diverged(
            f"diverged at step {self.step}: {error}; {where}. Lower optimizer.lr, raise "
            "backbone.steps or set backbone.density.penalty = 0.1, and --resume or begin again"
        )


class Labelled:
    """A start that always begins with these classes."""

    def __init__(self, start: Start, y: Tensor) -> None:
        self.start, self.y = start, y

    def draw(self, n: int, rng: Generator, y: Tensor | None = None) -> Tensor:
        return self.start.draw(n, rng, self.y[:n] if y is None else y)


def task_of(recipe: Recipe, splits: Splits) -> Task:
    """What the parts must know of this recipe's data and length; reads the training split."""
    images = splits.images("train")
    n_train = len(images.y)
    steps = n_train // min(recipe.run.batch_size, n_train)
    return Task(
        shape=tuple(images.x.shape[1:]),  # type: ignore[arg-type]
        n_classes=recipe.data.n_classes,
        radius_px=recipe.data.radius_px,
        n_train=n_train,
        total_steps=steps * recipe.run.epochs,
        images=splits.images,
        hash=images_hash(images),
        augmentation=recipe.data.augmentation,
    )


def check_sizes(recipe: Recipe, task: Task) -> None:
    """Refuse a distance that the images are too small for."""
    distance = getattr(recipe.objective, "distance", None)
    if isinstance(distance, Distance) and task.shape[1] < distance.min_size:
        raise MisfitError(
            f"the distance {type(distance).__name__} takes images of {distance.min_size} px at "
            f"least; these have {task.shape[1]}. Choose objective.distance none, l2 or logits"
        )


def load_model(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Weights into a model, every name and shape of both accounted for."""
    wanted = model.state_dict()
    wrong = [
        f"{name}: {list(weights[name].shape)}, wanted {list(t.shape)}"
        for name, t in wanted.items()
        if name in weights and weights[name].shape != t.shape
    ]
    missing, extra = sorted(wanted.keys() - weights), sorted(weights.keys() - wanted)
    if wrong or missing or extra:
        raise DataError(
            "the weights do not fit the model: "
            + "; ".join(
                f"{label} {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
                for label, names in (("shapes", wrong), ("missing", missing), ("unknown", extra))
                if names
            )
        )
    model.load_state_dict(weights)


def with_gaps(row: dict[str, Any]) -> dict[str, Any]:
    """A row of metrics with the differences of its mean energies."""
    if "E(x+)" in row and "E(x-)" in row:
        row = {**row, "gap x+ x-": row["E(x+)"] - row["E(x-)"]}
    if "E(x~)" in row and "E(x)" in row:
        row = {**row, "gap x~ x": row["E(x~)"] - row["E(x)"]}
    return row


def train(
    resolved: Resolved,
    out: Path,
    *,
    registry: Registry,
    resume: bool = False,
    init_from: Path | None = None,
    watch: Watch | None = None,
    stop: Callable[[], bool] | None = None,
) -> Summary:
    """Train a recipe into the folder `out` and judge its best epoch on the test split.

    Raises ConfigError or DataError before the first step, Diverged, or Preempted once it is saved.
    """
    whole = complete(resolved, registry)
    folder = RunFolder.open(out) if resume else None
    trainer = Trainer(whole, folder or RunFolder(out), watch)
    if stop is not None:
        trainer.stop = stop
    if folder is not None:
        resume_from(trainer, folder)
    else:
        if init_from is not None:
            load_model(trainer.backbone.model, checkpoint.load_weights(init_from))
        trainer.folder = RunFolder.create(out)
        trainer.folder.write_config(whole.tables, whole.origins)
    trainer.folder.link_latest()
    trainer.folder.event("resume" if resume else "start", step=trainer.step)
    trainer.run()
    return trainer.finish()


def resume_from(trainer: Trainer, folder: RunFolder) -> None:
    """Put a trainer where the newest checkpoint of its folder stands."""
    newest = checkpoint.newest(folder.checkpoints)
    if newest is None:
        raise DataError(f"{folder.path} holds no complete checkpoint to resume from")
    trainer.load_state_dict(checkpoint.load(newest))
    folder.drop_metrics_from(trainer.step)
