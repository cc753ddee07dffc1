"""Pages of the site that are made from the code: every part, every setting, every command, the API.

A hook of mkdocs; `mkdocs.yml` names it.
"""

import ast
import inspect
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "plugins"), str(ROOT / "cli")]

from jemkit.config.catalogue import Option, options_of, shown  # noqa: E402
from jemkit.config.recipe import Recipe  # noqa: E402
from jemkit.config.registry import Registry, installed  # noqa: E402

KINDS = {
    "backbone": ("Backbones", "A JEM variant: its network, energy, sampler and replay buffer.",
                 "jemkit train --backbone {}"),
    "objective": ("Objectives", "What a training step minimises.", "jemkit train --objective {}"),
    "updater": ("Updaters", "How a loss changes the weights.", "jemkit train --updater {}"),
    "network": ("Networks", "Images to features.", "jemkit train --network {}"),
    "energy": ("Energies", "Features to logits and E(x).", "--set backbone.energy.use={}"),
    "sampler": ("Samplers", "One step of a chain. Sizes are in model units, pixels in [-1, 1].",
                "jemkit train --sampler {}"),
    "start": ("Initial distributions", "Where chains begin.", "--set backbone.start.use={}"),
    "density": ("Densities", "How p(x) is drawn and learnt.", "--set backbone.density.use={}"),
    "ascent": ("Ascents", "One step of EB-JDAT's inner maximisation.",
               "--set objective.ascent.use={}"),
    "distance": ("Distances", "d(x, x~) of EB-JDAT's inner energy.",
                 "--set objective.distance.use={}"),
    "dataset": ("Data sets", "Where labelled images come from.", "jemkit train --dataset {}"),
    "attack": ("Attacks", "Adversarial images, for evaluation and for training.",
               "jemkit evaluate --attack {}"),
    "evaluator": ("Evaluators", "What `jemkit evaluate` measures.", "jemkit evaluate --only {}"),
    "tracker": ("Trackers", "What receives a run's figures while it trains.",
                "jemkit train --tracker {}"),
}  # fmt: skip
"""Each kind's title, what it is, and how a part of it is selected."""

API = {
    "models": "Models and energies", "backbone": "Models and energies", "data": "Data",
    "splits": "Data", "sampling": "Sampling", "attacks": "Attacks", "objective": "Training",
    "updaters": "Training", "step": "Training", "training": "Training", "runtime": "Training",
    "metrics": "Evaluation", "evaluation": "Evaluation", "config": "Recipes and plug-ins",
    "hookspecs": "Recipes and plug-ins", "options": "Recipes and plug-ins", "errors": "Errors",
    "testing": "Tests of plug-ins",
}  # fmt: skip
"""The page of the API's reference for a name, by the module that defines it."""


def escaped(text: str) -> str:
    """A docstring as Markdown: its formulas are no markup, what is in backticks stays code."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(p if p.startswith("`") else re.sub(r"([\\*_<\[\]|#])", r"\\\1", p)
                   for p in parts)  # fmt: skip


def docstring(thing: Any, *, blocks: bool = True) -> str:
    """Paragraphs of a docstring; indented ones, such as formulas, are code blocks."""
    paragraphs = (inspect.getdoc(thing) or "").split("\n\n")
    return "\n\n".join(p if p.startswith("    ") else escaped(p) for p in paragraphs
                       if blocks or not p.startswith("    "))  # fmt: skip


def option_table(options: list[Option], registry: Registry) -> Iterator[str]:
    if not options:
        yield "No options."
        return
    yield "| option | type | bounds | default | meaning |\n|---|---|---|---|---|"
    for option in options:
        default = "(required)" if option.required else f"`{shown(option.default, registry)}`"
        kind = linked(option.type)
        yield f"| `{option.name}` | {kind} | {option.bounds} | {default} | {cell(option.meaning)} |"


def linked(kind: str) -> str:
    """The type of an option; the name of a kind of part leads to its page."""
    words = kind.split(" | ")
    return " \\| ".join(f"[{w}]({w}.md)" if w in KINDS else f"`{w}`" for w in words)


def cell(text: str) -> str:
    return escaped(text).replace("\n", " ")


def formulas(kind: str, name: str) -> str:
    """The formulas of a part, from equations.toml, as Markdown; empty where there are none."""
    return "".join(f"$$\n{tex}\n$$\n\n" for tex in equations().get(kind, {}).get(name, ()))


@cache
def equations() -> dict[str, dict[str, list[str]]]:
    return tomllib.loads(Path(__file__).with_name("equations.toml").read_text())


def part_page(kind: str, registry: Registry) -> str:
    title, what, use = KINDS[kind]
    lines = [f"# {title}\n\n{what}\n"]
    for name, part in registry[kind].items():
        source = Path(inspect.getfile(part)).relative_to(ROOT).as_posix()
        module = (sys.modules[part.__module__].__doc__ or "").partition("\n")[0]
        about = f"*{escaped(module)}*\n\n" if source.startswith("plugins/") else ""
        tex = formulas(kind, name)
        text = docstring(part, blocks=not tex)
        lines.append(f"## `{name}` {{ #{name} }}\n\n{about}{text}\n\n{tex}")
        word = f"{name}-NAME" if name in ("timm", "torchvision") else name
        lines.append(f"`{use.format(word)}` · [source](../../{source})\n")
        lines += [*option_table(options_of(part, registry), registry), ""]
    return "\n".join(lines)


def settings_page(registry: Registry) -> str:
    """The tables of a recipe that are no parts: run, optimizer, schedule, sentinel, extra."""
    lines = ["# Settings of a run\n\nThe tables of a recipe besides its parts. `--set "
             "run.epochs=30` sets one; `jemkit config show` prints all with their "
             "origins.\n"]  # fmt: skip
    for name in ("run", "optimizer", "schedule", "sentinel", "extra"):
        tables = Recipe.model_fields[name].annotation
        for table in get_args(tables) or (tables,):
            which = f" `{table.__name__.lower()}`" if get_args(tables) else ""
            lines += [f"## `{name}`{which}\n\n{docstring(table)}\n"]
            lines += [*option_table(options_of(table, registry), registry), ""]
    return "\n".join(lines)


def public_names() -> dict[str, list[str]]:
    """Every public name as the path of its definition, by its page's title."""
    files = (ROOT / "jemkit" / "public.py", ROOT / "jemkit" / "testing" / "__init__.py")
    pages: dict[str, list[str]] = {title: [] for title in dict.fromkeys(API.values())}
    for node in (node for file in files for node in ast.walk(ast.parse(file.read_text()))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jemkit."):
            title = API[node.module.split(".")[1]]
            pages[title] += [f"{node.module}.{alias.name}" for alias in node.names]
    return {title: sorted(set(names), key=lambda n: n.rpartition(".")[2].lower())
            for title, names in pages.items()}  # fmt: skip


def slug(title: str) -> str:
    return title.lower().replace(" ", "-")


def pages() -> Iterator[tuple[str, str]]:
    """Paths in docs/, and their Markdown."""
    registry = installed(third_party=False)
    index = ["# Reference\n\nThese pages are made from the code.\n\n| kind | parts |\n|---|---|"]
    for kind, (title, _, _) in KINDS.items():
        yield f"reference/{kind}.md", part_page(kind, registry)
        names = ", ".join(f"[`{name}`]({kind}.md#{name})" for name in registry[kind])
        index.append(f"| [{title}]({kind}.md) | {names} |")
    yield "reference/settings.md", settings_page(registry)
    index.append("\n[Settings of a run](settings.md): epochs, batch size, device, schedule.\n")
    for title, names in public_names().items():
        entries = "\n\n".join(f"::: {name}" for name in names)
        yield f"reference/api/{slug(title)}.md", f"# {title}\n\n{entries}\n"
        listed = ", ".join(f"[`{n.rpartition('.')[2]}`][{n}]" for n in names)
        index.append(f"- [{title}](api/{slug(title)}.md): {listed}")
    yield "reference/index.md", "\n".join(index)


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for path, text in pages():
        files.append(File.generated(config, path, content=text))
    return files
