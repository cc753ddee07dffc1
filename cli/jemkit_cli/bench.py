"""`jemkit bench`: the time of a training step and its roofline, the error of each precision."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from jemkit_cli.selection import LAYERS, RecipeOptions
from jemkit_cli.terminal import say, say_json, show_table, takes

if TYPE_CHECKING:
    from jemkit.training.profiling.roofline import Roofline

MODEL = (
    "backbone",
    "dataset",
    "network",
    "data_dir",
    "download",
    "device",
    "channels_last",
    *LAYERS,
)

app = typer.Typer(
    no_args_is_help=True, help="Time and memory of a training step, and its roofline."
)


@app.command("floor", hidden=True)  # its name before 0.2
@app.command()
@takes(
    RecipeOptions, *MODEL, "objective", "sampler", "updater", "batch_size", "precision", "compile"
)
def roofline(
    recipe: RecipeOptions,
    rounds: Annotated[
        int, typer.Option(min=0, help="Steps to time; 0 prints only the roofline.")
    ] = 3,
    patience: Annotated[
        float, typer.Option(min=0, help="Seconds to repeat each operation for.")
    ] = 0.2,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
) -> None:
    """Compute the roofline of a training step, and time the step."""
    resolved = recipe.resolve(recipe.registry())
    from jemkit.training.build import build_run
    from jemkit.training.profiling.roofline import protocol, roofline_of

    parts = build_run(resolved.recipe)
    card = protocol(resolved, parts, rounds)
    bound = roofline_of(parts, resolved.recipe, rounds=rounds, patience=patience)
    if as_json:
        say_json({"protocol": card, **bound.figures()})
        return
    _show(bound)
    _show_protocol(card)


@app.command()
@takes(RecipeOptions, *MODEL)
def accuracy(
    recipe: RecipeOptions,
    images: Annotated[int, typer.Option(min=1, help="Images to take gradients at.")] = 16,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
) -> None:
    """Compare a new model's energy gradients in each precision with float64."""
    resolved = recipe.resolve(recipe.registry())
    from jemkit.training.build import build_run
    from jemkit.training.profiling.precision_error import accuracy_of, protocol

    parts = build_run(resolved.recipe)
    accuracies = accuracy_of(parts, images)
    card = protocol(resolved, parts, accuracies)
    if as_json:
        say_json({"protocol": card, **{each.precision: each._asdict() for each in accuracies}})
        return
    heads = ["precision", "relative error, median", "worst", "signs flipped"]
    show_table(heads, [[p, f"{m:.1e}", f"{w:.1e}", f"{s:.2%}"] for p, m, w, s, _ in accuracies])
    _show_protocol(card)


def _show(roofline: "Roofline") -> None:
    from jemkit.training.profiling.roofline import rows

    show_table(["", ""], rows(roofline))
    if roofline.reached is not None:
        say(f"the step reaches {roofline.reached:.0%} of its roofline")


def _show_protocol(card: dict[str, Any]) -> None:
    """The machine and versions of a measurement, under its table."""
    for name, value in card.items():
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        say(f"  {name}: {text}")
