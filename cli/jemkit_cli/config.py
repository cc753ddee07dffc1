"""`jemkit config`: what a recipe says, and where each of its values comes from."""

import json
from typing import Annotated, Any

import typer

from jemkit_cli import selection as pick
from jemkit_cli.terminal import guarded, installed_parts, say, say_json

app = typer.Typer(no_args_is_help=True, help="Recipes: resolved, with origins, and their schema.")


@app.command()
@guarded
def show(
    backbone: pick.Backbone = None,
    objective: pick.Objective = None,
    dataset: pick.Dataset = None,
    network: pick.Network = None,
    sampler: pick.Sampler = None,
    updater: pick.Updater = None,
    data_dir: pick.DataDir = None,
    download: pick.Download = None,
    epochs: pick.Epochs = None,
    batch_size: pick.BatchSize = None,
    seed: pick.Seed = None,
    device: pick.Device = None,
    precision: pick.Precision = None,
    compile: pick.Compile = None,
    channels_last: pick.ChannelsLast = None,
    deterministic: pick.Deterministic = None,
    shard: pick.Shard = None,
    preset: pick.Preset = None,
    config: pick.Config = None,
    overrides: pick.Set = None,
    no_plugins: pick.NoPlugins = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object: recipe and origins.")
    ] = False,
) -> None:
    """Show the recipe that `train` would run with these options, each value with its origin.

    Both forms, saved to a .toml or .json file, can be fed back by --config.
    """
    options: dict[str, Any] = {
        "backbone": backbone,
        "objective": objective,
        "dataset": dataset,
        "network": network,
        "sampler": sampler,
        "updater": updater,
        "data_dir": data_dir,
        "download": download,
        "epochs": epochs,
        "batch_size": batch_size,
        "seed": seed,
        "device": device,
        "precision": precision,
        "compile": compile,
        "channels_last": channels_last,
        "deterministic": deterministic,
        "shard": shard,
    }
    registry = installed_parts(third_party=not no_plugins)
    resolved = pick.chosen(registry, options, preset=preset, config=config, overrides=overrides)
    if as_json:
        say_json({"recipe": resolved.tables, "origins": resolved.origins}, indent=1)
        return
    from jemkit.config.layers import flat

    for key, value in flat(resolved.tables):
        say(f"{_assignment(key, value):<48}  # {resolved.origins[key]}")


@app.command()
@guarded
def schema(no_plugins: pick.NoPlugins = False) -> None:
    """Print the JSON schema of a recipe and of every part."""
    registry = installed_parts(third_party=not no_plugins)
    from jemkit.config.recipe import schema as of

    say_json(of(registry), indent=1)


def _assignment(key: str, value: Any) -> str:
    """A line of TOML; TOML has no word for a value that is not set."""
    if value is None:
        return f"# {key} is not set"
    return f"{key} = {json.dumps(value, ensure_ascii=False)}"
