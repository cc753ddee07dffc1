"""The options that choose a recipe, declared once for every command that takes some of them."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from jemkit_cli.terminal import installed_parts

if TYPE_CHECKING:
    from jemkit.config.recipe import Resolved
    from jemkit.config.registry import Registry


def _option(name: str, text: str, panel: str, metavar: str | None = None) -> Any:
    return typer.Option(name, help=text, metavar=metavar, rich_help_panel=panel, show_default=False)


LAYERS = ("preset", "config", "overrides", "no_plugins")
"""The options of every command that resolves a recipe."""
PARTS, RUN, RECIPE = "Parts (see `jemkit plugins list`)", "Run", "Recipe"


@dataclass
class RecipeOptions:
    """What a command was given of a recipe.

    A field is an option, in the order of `--help`, with the key of the recipe that it sets.
    """

    backbone: Annotated[
        str | None, _option("--backbone", "A JEM variant.", PARTS, "NAME"), "backbone.use"
    ] = None
    objective: Annotated[
        str | None, _option("--objective", "What to learn.", PARTS, "NAME"), "objective.use"
    ] = None
    dataset: Annotated[
        str | None, _option("--dataset", "What to learn from.", PARTS, "NAME"), "data.use"
    ] = None
    network: Annotated[
        str | None,
        _option("--network", "The backbone's network, e.g. wrn-28-10.", PARTS, "NAME"),
        "backbone.network.use",
    ] = None
    sampler: Annotated[
        str | None,
        _option("--sampler", "The backbone's sampler.", PARTS, "NAME"),
        "backbone.sampler.use",
    ] = None
    updater: Annotated[
        str | None, _option("--updater", "How weights move.", PARTS, "NAME"), "updater.use"
    ] = None
    data_dir: Annotated[
        Path | None,
        _option("--data-dir", "Where the data set's files are.", PARTS),
        "data.dir",
    ] = None
    download: Annotated[
        bool | None,
        _option("--download", "Fetch the data set where it is missing.", PARTS),
        "data.download",
    ] = None
    extra_data: Annotated[
        Path | None,
        _option("--extra-data", "Generated images to mix in: an .npz.", PARTS, "FILE"),
        "extra.file",
    ] = None
    extra_fraction: Annotated[
        float | None,
        _option("--extra-fraction", "Their part of every batch, such as 0.7.", PARTS),
        "extra.fraction",
    ] = None
    extra_labels: Annotated[
        Path | None,
        _option("--extra-labels", "A model to label them, if they have no labels.", PARTS, "MODEL"),
        "extra.labels",
    ] = None
    epochs: Annotated[
        int | None, _option("--epochs", "Passes over the training images.", RUN), "run.epochs"
    ] = None
    batch_size: Annotated[
        int | None, _option("--batch-size", "Images in a batch.", RUN), "run.batch_size"
    ] = None
    seed: Annotated[int | None, _option("--seed", "Of every generator.", RUN), "run.seed"] = None
    device: Annotated[
        Literal["auto", "cpu", "cuda"] | None,
        _option("--device", "Where to run.", RUN),
        "run.device",
    ] = None
    precision: Annotated[
        Literal["fp32", "tf32", "bf16"] | None,
        _option("--precision", "Of the passes; energies stay float32.", RUN),
        "run.precision",
    ] = None
    compile: Annotated[
        bool | None,
        _option("--compile/--no-compile", "Compile the gradients of chains.", RUN),
        "run.compile",
    ] = None
    channels_last: Annotated[
        Literal["auto", "yes", "no"] | None,
        _option("--channels-last", "Memory layout of weights; auto is a rule.", RUN),
        "run.channels_last",
    ] = None
    deterministic: Annotated[
        bool | None,
        _option("--deterministic", "Only deterministic algorithms.", RUN),
        "run.deterministic",
    ] = None
    shard: Annotated[
        bool | None,
        _option("--shard/--no-shard", "Under torchrun, share the weights out over GPUs.", RUN),
        "run.shard",
    ] = None
    preset: Annotated[
        str | None, _option("--preset", "A layer that ships with jemkit.", RECIPE, "NAME")
    ] = None
    config: Annotated[
        Path | None, _option("--config", "A TOML file, or a run's config.json.", RECIPE, "FILE")
    ] = None
    overrides: Annotated[
        list[str] | None,
        _option("--set", "Any option, e.g. optimizer.lr=0.01; repeatable.", RECIPE, "K=V"),
    ] = None
    no_plugins: Annotated[
        bool, _option("--no-plugins", "Only the parts that come with jemkit.", RECIPE)
    ] = False

    def registry(self) -> "Registry":
        return installed_parts(third_party=not self.no_plugins)

    def layers(self) -> dict[str, Any]:
        """The layers of `resolve`; `named` has the tables of the options that were given."""
        named: dict[str, Any] = {}
        for option in fields(self):
            _, *key = cast(Any, option.type).__metadata__
            value = getattr(self, option.name)
            if not key or value is None:
                continue
            *path, last = key[0].split(".")
            table = named
            for step in path:
                table = table.setdefault(step, {})
            table[last] = str(value) if isinstance(value, Path) else value
        return {
            "preset": self.preset, "config": self.config, "overrides": self.overrides or (),
            "named": named,
        }  # fmt: skip

    def resolve(self, registry: "Registry") -> "Resolved":
        """The recipe of these options, every default written out."""
        from jemkit.config.recipe import complete, resolve

        return complete(resolve(registry, **self.layers()), registry)
