"""`jemkit plugins new`: writes a package with one part, its test and its metadata."""

import keyword
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from jemkit_cli.plugins.listing import offers_of
from jemkit_cli.terminal import guarded, installed_parts, say

if TYPE_CHECKING:
    from jemkit.config.registry import Registry

Kind = Literal[
    "backbone", "objective", "sampler", "updater", "distance", "dataset", "attack", "evaluator",
    "tracker",
]  # fmt: skip
USES = {
    "distance": "jemkit train --set objective.distance.use=$name",
    "attack": "jemkit evaluate runs/RUN --attack $name",
    "evaluator": "jemkit evaluate runs/RUN --only $name",
}
"""The command that uses a part; of the other kinds it is an option of `jemkit train`."""

NO_TEXT = ("true", "false", "inf", "nan")
"""Words that TOML reads as something else than text."""
LONGEST = 40
"""Characters of a name, as a recipe limits those of trackers."""

FILES = {
    "pyproject": "pyproject.toml",
    "readme": "README.md",
    "test": "tests/test_laws.py",
    "ci": ".github/workflows/test.yml",
}
"""The files of a package beside its module, by their templates."""


@guarded
def new(
    name: Annotated[str, typer.Argument(help="The part's name: one lower-case word.")],
    kind: Annotated[Kind, typer.Option(help="What the part is.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the package; ./NAME by default.")
    ] = None,
) -> None:
    """Write a package with one part that works, its conformance test, README and CI file."""
    _check_name(name, kind, installed_parts(third_party=True))
    from jemkit.errors import UsageError
    from jemkit.hookspecs import API
    from jemkit.runtime.files import new_folder, write_text

    folder = Path(name) if out is None else out
    if folder.exists() or folder.is_symlink():
        raise UsageError(f"{folder} already exists; choose another --out")
    part = name.title().replace("_", "") + kind.title()
    values = {"name": name, "Class": part, "kind": kind, "api": str(API)}
    values["use"] = Template(USES.get(kind, f"jemkit train --{kind} $name")).substitute(values)
    module = f"jemkit_{name}.py"
    with new_folder(folder) as work:
        for template, path in {**FILES, kind: module}.items():
            target = work / path
            target.parent.mkdir(parents=True, exist_ok=True)
            write_text(target, _template(template).substitute(values))
    say(f"wrote {folder}: {kind} {name}, in {module}")
    say(f"install it:  pip install -e {folder}")
    say(f"use it:      {values['use']}")
    say(f"test it:     jemkit plugins check {name}   (or: pytest {folder})")


def _template(name: str) -> Template:
    from jemkit.runtime.opening import read_text

    return Template(read_text(Path(__file__).parent / "templates" / f"{name}.template"))


def _check_name(name: str, kind: str, registry: "Registry") -> None:
    from jemkit.errors import ConfigError, UsageError

    word = name.isascii() and name.isidentifier() and name == name.lower()
    if not word or name.startswith("_") or keyword.iskeyword(name) or len(name) > LONGEST:
        raise UsageError(
            f"{name[:LONGEST]!r} cannot be the name of a part: it should be one lower-case word of "
            f"letters, digits and _, of at most {LONGEST} characters, such as my_{kind}"
        )
    if name in NO_TEXT:
        raise UsageError(
            f"{name!r} cannot be the name of a part: TOML, and so --set KEY={name}, reads it as "
            f"a value that is not text; choose another, such as my_{name}"
        )
    for offer in offers_of(registry):
        if offer.name == name:
            raise ConfigError(
                f"there is already a part {name!r}, the {offer.kind} of {offer.distribution}; "
                "choose another name"
            )
    if find_spec(f"jemkit_{name}") is not None:
        raise ConfigError(
            f"the module jemkit_{name} is already installed; choose another name, or uninstall it"
        )
