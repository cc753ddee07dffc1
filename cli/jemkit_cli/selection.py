"""The options that choose a recipe, shared by `train` and `config show`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from jemkit.config.recipe import Resolved
    from jemkit.config.registry import Registry


def _option(name: str, text: str, panel: str, metavar: str | None = None) -> Any:
    return typer.Option(name, help=text, metavar=metavar, rich_help_panel=panel, show_default=False)


PARTS, RUN, RECIPE = "Parts (see `jemkit plugins list`)", "Run", "Recipe"

Backbone = Annotated[str | None, _option("--backbone", "A JEM variant.", PARTS, "NAME")]
Objective = Annotated[str | None, _option("--objective", "What to learn.", PARTS, "NAME")]
Dataset = Annotated[str | None, _option("--dataset", "What to learn from.", PARTS, "NAME")]
Network = Annotated[
    str | None, _option("--network", "The backbone's network, e.g. wrn-28-10.", PARTS, "NAME")
]
Sampler = Annotated[str | None, _option("--sampler", "The backbone's sampler.", PARTS, "NAME")]
Updater = Annotated[str | None, _option("--updater", "How weights move.", PARTS, "NAME")]
DataDir = Annotated[Path | None, _option("--data-dir", "Where the data set's files are.", PARTS)]
Download = Annotated[
    bool | None, _option("--download", "Fetch the data set where it is missing.", PARTS)
]
Epochs = Annotated[int | None, _option("--epochs", "Passes over the training images.", RUN)]
BatchSize = Annotated[int | None, _option("--batch-size", "Images in a batch.", RUN)]
Seed = Annotated[int | None, _option("--seed", "Of every generator.", RUN)]
Device = Annotated[Literal["auto", "cpu", "cuda"] | None, _option("--device", "Where to run.", RUN)]
Precision = Annotated[
    Literal["fp32", "tf32", "bf16"] | None,
    _option("--precision", "Of the passes; energies stay float32.", RUN),
]
Compile = Annotated[
    bool | None, _option("--compile/--no-compile", "Compile the gradients of chains.", RUN)
]
ChannelsLast = Annotated[
    Literal["auto", "yes", "no"] | None,
    _option("--channels-last", "Memory layout of weights; auto is a rule.", RUN),
]
Deterministic = Annotated[
    bool | None, _option("--deterministic", "Only deterministic algorithms.", RUN)
]
Shard = Annotated[
    bool | None,
    _option("--shard/--no-shard", "Under torchrun, share the weights out over GPUs.", RUN),
]
Preset = Annotated[
    str | None, _option("--preset", "A layer that ships with jemkit.", RECIPE, "NAME")
]
Config = Annotated[
    Path | None, _option("--config", "A TOML file, or a run's config.json.", RECIPE, "FILE")
]
Set = Annotated[
    list[str] | None,
    _option("--set", "Any option, e.g. optimizer.lr=0.01; repeatable.", RECIPE, "K=V"),
]
NoPlugins = Annotated[
    bool, _option("--no-plugins", "Only the parts that come with jemkit.", RECIPE)
]

PLACES = {
    "backbone": "backbone.use",
    "network": "backbone.network.use",
    "sampler": "backbone.sampler.use",
    "objective": "objective.use",
    "updater": "updater.use",
    "dataset": "data.use",
    "data_dir": "data.dir",
    "download": "data.download",
    "epochs": "run.epochs",
    "batch_size": "run.batch_size",
    "seed": "run.seed",
    "device": "run.device",
    "precision": "run.precision",
    "compile": "run.compile",
    "channels_last": "run.channels_last",
    "deterministic": "run.deterministic",
    "shard": "run.shard",
}
"""Where in a recipe each named option stands."""


def named(options: dict[str, Any]) -> dict[str, Any]:
    """The tables of the named options that were given."""
    tables: dict[str, Any] = {}
    for name, value in options.items():
        if value is None:
            continue
        *path, key = PLACES[name].split(".")
        table = tables
        for step in path:
            table = table.setdefault(step, {})
        table[key] = str(value) if isinstance(value, Path) else value
    return tables


def chosen(
    registry: "Registry",
    options: dict[str, Any],
    *,
    preset: str | None,
    config: Path | None,
    overrides: list[str] | None,
) -> "Resolved":
    """The recipe of these options, every default written out."""
    from jemkit.config.recipe import complete, resolve

    found = resolve(
        registry,
        preset=preset,
        config=config,
        overrides=overrides or (),
        named=named(options),
    )
    return complete(found, registry)
