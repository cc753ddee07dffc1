"""`jemkit config`: the settings of a recipe, with the origin of each value."""

import json
from typing import Annotated, Any

import typer

from jemkit_cli.selection import RecipeOptions
from jemkit_cli.terminal import say, say_json, takes

app = typer.Typer(no_args_is_help=True, help="Recipes: resolved, with origins, and their schema.")


@app.command()
@takes(RecipeOptions)
def show(
    recipe: RecipeOptions,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object: recipe and origins.")
    ] = False,
) -> None:
    """Show the recipe that `train` would run with these options, with the origin of each value.

    Saved as a .toml or .json file, either output can be passed to --config.
    """
    resolved = recipe.resolve(recipe.registry())
    if as_json:
        say_json({"recipe": resolved.tables, "origins": resolved.origins}, indent=1)
        return
    from jemkit.config.layers import flat

    for key, value in flat(resolved.tables):
        say(f"{_assignment(key, value):<48}  # {resolved.origins[key]}")


@app.command()
@takes(RecipeOptions, "no_plugins")
def schema(recipe: RecipeOptions) -> None:
    """Print the JSON schema of a recipe and of every part."""
    registry = recipe.registry()
    from jemkit.config.recipe import schema as of

    say_json(of(registry), indent=1)


def _assignment(key: str, value: Any) -> str:
    """A line of TOML, which cannot express a value that is not set."""
    if value is None:
        return f"# {key} is not set"
    return f"{key} = {json.dumps(value, ensure_ascii=False)}"
