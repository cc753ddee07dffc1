"""The options that select a recipe, declared once for all commands that use them."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from jemkit_cli.terminal import installed_parts

if TYPE_CHECKING:
    from jemkit.config.recipe import Resolved
    from jemkit.config.registry import Registry
    from jemkit.evaluation.user_code import Preparation


def _option(name: str, text: str, panel: str, metavar: str | None = None) -> Any:
    return typer.Option(name, help=text, metavar=metavar, rich_help_panel=panel, show_default=False)


LAYERS = ("preset", "config", "overrides", "no_plugins")
"""The options of every command that resolves a recipe."""
PARTS, RUN, RECIPE = "Parts (see `jemkit plugins list`)", "Run", "Recipe"


@dataclass
class RecipeOptions:
    """The options of a command that select parts of a recipe.

    A field is an option, in the order of `--help`, with the key of the recipe that it sets.
    """

    backbone: Annotated[
        str | None, _option("--backbone", "A JEM variant.", PARTS, "NAME"), "backbone.use"
    ] = None
    objective: Annotated[
        str | None, _option("--objective", "Training loss.", PARTS, "NAME"), "objective.use"
    ] = None
    dataset: Annotated[str | None, _option("--dataset", "Data set.", PARTS, "NAME"), "data.use"] = (
        None
    )
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
        str | None, _option("--updater", "Update rule.", PARTS, "NAME"), "updater.use"
    ] = None
    tracker: Annotated[
        list[str] | None,
        _option("--tracker", "Receives the figures, e.g. wandb; repeatable.", PARTS, "NAME"),
        "trackers",
    ] = None
    data_dir: Annotated[
        Path | None,
        _option("--data-dir", "Folder of the data set's files.", PARTS),
        "data.dir",
    ] = None
    download: Annotated[
        bool | None,
        _option("--download", "Download the data set if it is missing.", PARTS),
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
    epochs: Annotated[int | None, _option("--epochs", "Number of epochs.", RUN), "run.epochs"] = (
        None
    )
    batch_size: Annotated[
        int | None, _option("--batch-size", "Batch size.", RUN), "run.batch_size"
    ] = None
    seed: Annotated[
        int | None, _option("--seed", "Seed of all random generators.", RUN), "run.seed"
    ] = None
    device: Annotated[
        Literal["auto", "cpu", "cuda"] | None,
        _option("--device", "Device to run on.", RUN),
        "run.device",
    ] = None
    precision: Annotated[
        Literal["fp32", "tf32", "bf16"] | None,
        _option("--precision", "Of forward passes; energies stay fp32.", RUN),
        "run.precision",
    ] = None
    compile: Annotated[
        bool | None,
        _option("--compile/--no-compile", "Compile the gradients of chains.", RUN),
        "run.compile",
    ] = None
    channels_last: Annotated[
        Literal["auto", "yes", "no"] | None,
        _option("--channels-last", "Memory format of weights.", RUN),
        "run.channels_last",
    ] = None
    deterministic: Annotated[
        bool | None,
        _option("--deterministic", "Use only deterministic algorithms.", RUN),
        "run.deterministic",
    ] = None
    shard: Annotated[
        bool | None,
        _option("--shard/--no-shard", "With torchrun: FSDP-sharded weights.", RUN),
        "run.shard",
    ] = None
    preset: Annotated[
        str | None, _option("--preset", "Settings that reproduce a paper.", RECIPE, "NAME")
    ] = None
    config: Annotated[
        Path | None, _option("--config", "A TOML file, or a run's config.json.", RECIPE, "FILE")
    ] = None
    overrides: Annotated[
        list[str] | None,
        _option("--set", "Any option, e.g. optimizer.lr=0.01; repeatable.", RECIPE, "K=V"),
    ] = None
    no_plugins: Annotated[bool, _option("--no-plugins", "Use only jemkit's own parts.", RECIPE)] = (
        False
    )

    def registry(self) -> "Registry":
        return installed_parts(third_party=not self.no_plugins)

    def layers(self) -> dict[str, Any]:
        """The layers of `resolve`; `named` has the tables of the given options."""
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
            if isinstance(value, list):
                value = {name: {"use": name} for name in value}
            table[last] = str(value) if isinstance(value, Path) else value
        return {
            "preset": self.preset, "config": self.config, "overrides": self.overrides or (),
            "named": named,
        }  # fmt: skip

    def resolve(self, registry: "Registry") -> "Resolved":
        """The recipe of these options, with every default written out."""
        from jemkit.config.recipe import complete, resolve

        return complete(resolve(registry, **self.layers()), registry)


CODE = "A model of Python code, my.py:build"
Weights = Annotated[
    Path | None, _option("--weights", "Its weights: .pt, .pth or .safetensors.", CODE, "FILE")
]
WeightsKey = Annotated[
    str | None, _option("--key", "Key of the weights, if the file has several.", CODE, "NAME")
]
Mean = Annotated[
    str | None,
    _option("--mean", "Mean of each channel in [0, 1], subtracted from images.", CODE, "M,M,M"),
]
Std = Annotated[
    str | None,
    _option("--std", "Standard deviation of each channel, divided by.", CODE, "S,S,S"),
]


def preparation(
    weights: Path | None, key: str | None, mean: str | None, std: str | None
) -> "Preparation":
    """These options, as the library takes them."""
    from jemkit.evaluation.user_code import Preparation, numbers_of

    means, stds = numbers_of(mean, "--mean"), numbers_of(std, "--std")
    return Preparation(weights, key, means, stds)
