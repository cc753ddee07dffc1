"""A study: rows of recipes, seeds and one protocol; a run is identified by its resolved recipe."""

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field, ValidationError

from jemkit.config.layers import Table, flat, read_layer
from jemkit.config.messages import explain
from jemkit.config.recipe import Resolved, complete, resolve
from jemkit.config.registry import Registry
from jemkit.data import Dataset
from jemkit.errors import ConfigError, DataError, JemkitError, UnknownName
from jemkit.options import Options, nearest
from jemkit.runtime.files import read_json
from jemkit.runtime.precision import device_of, slow_precision
from jemkit.training.resuming import changes, may_differ

SAME_IMAGES = ("data.dir", "data.download")
"""Settings of the location of the images; a run records the hash of its images."""
IMAGES = ("data.dir", "extra.file", "extra.labels")
"""Settings that name files, which are not part of a run's key."""


STATISTICS = re.compile(r"\{statistics((?: [^{}]+)?)\}")
"""In options of `jemkit evaluate`: the file of the training images' Inception statistics.
Options of the `jemkit fid-stats` that writes it may follow: `{statistics --max-images 10000}`."""

LAST = ("--checkpoint", "last")
"""The last options of an evaluation of a run's last weights."""

Evaluation = tuple[str, ...]
"""The options of one `jemkit evaluate`."""


def _several(given: Any) -> Any:
    """The options of one evaluation as those of several."""
    texts = isinstance(given, list | tuple) and all(isinstance(each, str) for each in given)
    return (tuple(given),) if texts else given


class Row(Options):
    """One line of the table: a recipe, and what the paper reports for it."""

    name: str
    preset: str | None = None
    recipe: dict[str, Any] = Field(default_factory=dict)  # tables, as in a --config file
    settings: tuple[str, ...] = ()  # as with --set
    checkpoint: Literal["best", "last"] = "best"  # whose weights are evaluated
    after: str | None = None  # the row whose best weights its runs start from, seed by seed
    paper: dict[str, float] = Field(default_factory=dict)  # published figures by column
    protocol: str = ""  # what the published figures of this row differ in from the others
    missing: str = ""  # why there is no run of it: the row has the published figures alone


class Study(Options):
    """Rows that are trained with the same seeds and evaluated under one protocol."""

    title: str
    paper: str = ""  # data, network and protocol of the published figures
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    columns: tuple[str, ...] = ("clean", "pgd20")  # names of figures
    compared: str = "pgd20"  # the figure of the differences from the reference
    reference: str | None = None  # a row
    evaluate: Annotated[tuple[Evaluation, ...], BeforeValidator(_several)] = ((),)
    figure: Literal["energies", "trade-off", "samples"] | None = None  # drawn beside the table
    common: dict[str, Any] = Field(default_factory=dict)  # tables of every recipe
    settings: tuple[str, ...] = ()  # as with --set, over those of every row
    rows: tuple[Row, ...] = Field(min_length=1)

    def evaluations(self, row: Row) -> tuple[Evaluation, ...]:
        """The options of the evaluations of a row's runs."""
        which = LAST if row.checkpoint == "last" else ()
        return tuple((*options, *which) for options in self.evaluate)

    def row(self, name: str) -> Row:
        """The row of a name; a ConfigError if there is none."""
        names = [row.name for row in self.rows]
        if name not in names:
            raise ConfigError(f"the study has no row {name!r}{nearest(name, names)}")
        return self.rows[names.index(name)]


class Unit(NamedTuple):
    """One run of a study."""

    row: Row
    seed: int
    resolved: Resolved
    key: str  # SHA-256 of the settings that determine its outcome
    folder: Path


def read_study(source: Path | Table, origin: str) -> Study:
    """A study in TOML: a table [study], a table [common], and an array of tables [[rows]]."""
    content = read_layer(source)
    general = content.get("study", {})
    given = {**(general if isinstance(general, dict) else {}), **content}
    given.pop("study", None)
    try:
        study = Study.model_validate(given)
    except ValidationError as error:
        raise ConfigError(f"{origin}: {explain(error, given)}") from None
    names = [row.name for row in study.rows]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"{origin} has two rows {twice!r}; give each its own name")
    for name in (study.reference, *(row.after for row in study.rows)):
        if name is not None:
            study.row(name)
    return study


def find_study(registry: Registry, name: str, scale: str) -> Study:
    """The study of a TOML file, or study/NAME/SCALE of a plug-in, laid over its scale/SCALE."""
    if name.endswith(".toml"):
        return read_study(Path(name), name)
    key, whole = f"study/{name}/{scale}", f"scale/{scale}"
    if key in registry.recipes:
        general = read_layer(registry.recipes[whole]) if whole in registry.recipes else {}
        return read_study(merged(general, read_layer(registry.recipes[key])), key)
    there = sorted(k.removeprefix("study/") for k in registry.recipes if k.startswith("study/"))
    scales = [known for known in there if known.startswith(f"{name}/")]
    if scales:
        known = ", ".join(each.removeprefix(f"{name}/") for each in scales)
        raise UnknownName(f"{name} has no scale {scale!r}; it has {known}")
    names = sorted({each.partition("/")[0] for each in there})
    raise UnknownName(
        f"no study {name!r}{nearest(name, names)}. There are: {', '.join(names)}; a path of a TOML "
        f"file is allowed too"
    )


def part_of(study: Study, seeds: Sequence[int], rows: Sequence[str]) -> Study:
    """The study with only these seeds and rows; with all if none is given."""
    wanted = [study.row(name) for name in rows] or list(study.rows)
    for row in wanted:  # the loop also visits what it appends
        if row.after is not None and study.row(row.after) not in wanted:
            wanted.append(study.row(row.after))
    reference = study.reference if any(r.name == study.reference for r in wanted) else None
    return study.model_copy(
        update={"seeds": tuple(seeds) or study.seeds, "rows": tuple(wanted), "reference": reference}
    )


def with_settings(study: Study, settings: Sequence[str]) -> Study:
    """The study with more settings, as with --set, of every row."""
    return study.model_copy(update={"settings": (*study.settings, *settings)})


def sweep_study(
    settings: Sequence[str], seeds: tuple[int, ...], attacks: Sequence[str], columns: Sequence[str]
) -> Study:
    """A row for each combination of settings, named after those that vary."""
    choices = grid(settings)
    varied = [name for name in choices[0] if len({choice[name] for choice in choices}) > 1]
    rows = [
        Row(
            name=", ".join(f"{name} = {choice[name]}" for name in varied) or "run",
            settings=tuple(f"{name}={value}" for name, value in choice.items()),
        )
        for choice in choices
    ]
    only = [] if columns else ["robustness", "energies"]
    options = [*_repeated("--attack", attacks), *_repeated("--only", only), "--indicators", "off"]
    return Study(
        title="Sweep", seeds=seeds, columns=tuple(columns or ("clean", "pgd20", "gap_relative")),
        evaluate=(tuple(options),), rows=tuple(rows),
    )  # fmt: skip


def _repeated(option: str, values: Iterable[str]) -> list[str]:
    return [text for value in values for text in (option, value)]


def _check_no_seed(config: Mapping[str, Any], settings: Iterable[str]) -> None:
    """Reject a seed among the settings of a row, which the seeds of the study would replace."""
    run = config.get("run", {})
    named = [text.partition("=")[0].strip() for text in settings]
    if "run.seed" in named or (isinstance(run, Mapping) and "seed" in run):
        raise ConfigError(
            "run.seed is set, but every row is trained with the seeds of the study: give them by "
            "--seeds 0,1,2, or as seeds = [0, 1, 2] in [study]"
        )


def study_resolver(
    study: Study, registry: Registry, extra: Mapping[str, Any]
) -> Callable[[Row, int], Resolved]:
    """Resolves a row of a study file; `extra` are tables that are applied last."""

    def resolved(row: Row, seed: int) -> Resolved:
        config = merged(merged(study.common, row.recipe), extra)
        settings = (*row.settings, *study.settings)
        _check_no_seed(config, settings)
        named = {"run": {"seed": seed}}
        return resolve(
            registry, preset=row.preset, config=config, named=named,
            overrides=settings,
        )  # fmt: skip

    return resolved


def sweep_resolver(registry: Registry, layers: Mapping[str, Any]) -> Callable[[Row, int], Resolved]:
    """Resolves a combination of a sweep; `layers` are the other options."""

    def resolved(row: Row, seed: int) -> Resolved:
        _check_no_seed({}, row.settings)
        named = merged(layers["named"], {"run": {"seed": seed}})
        return resolve(registry, **{**layers, "overrides": row.settings, "named": named})

    return resolved


def units(
    study: Study, registry: Registry, out: Path, resolver: Callable[[Row, int], Resolved]
) -> list[Unit]:
    """The runs of a study, all rows of one seed before the next seed.

    A run that exists in `out` under any name is found by its key; a new one gets a folder named
    after its row, seed and key. Raises ConfigError if that folder is a run of another recipe.
    """
    there = _existing(registry, out)
    known = {run: folder for folder, run in there.items()}
    planned: dict[tuple[str, int], Unit] = {}
    trained = [row for row in _ordered(study) if not row.missing]
    for seed, row in itertools.product(study.seeds, trained):
        try:
            resolved = complete(resolver(row, seed), registry)
        except (ConfigError, DataError) as error:
            raise type(error)(f"row {row.name!r}: {error}") from None
        first = planned[row.after, seed] if row.after else None
        run = _Run(_key(resolved), first and first.folder.resolve())
        key = _key(resolved, first.key) if first else run.key
        slug = re.sub(r"[^a-z0-9]+", "-", row.name.lower()).strip("-")
        folder = known.get(run, out / f"{slug}-{seed}-{key[:8]}")
        if folder in there and there[folder] != run:
            raise ConfigError(
                f"{folder} is a run of another recipe than the row {row.name!r}: move it away, or "
                f"choose another --out"
            )
        unit = Unit(row, seed, resolved, key, folder)
        _check_places(planned.values(), unit)
        planned[row.name, seed] = unit
    return list(planned.values())


def _check_places(planned: Iterable[Unit], unit: Unit) -> None:
    """Reject two rows that would be one run: if only the images that a path names differ, or the
    checkpoint that is evaluated."""
    for other in (one for one in planned if one.key == unit.key):
        differing = changes(other.resolved.tables, unit.resolved.tables)
        if named := [change.key for change in differing if change.key in IMAGES]:
            raise ConfigError(
                f"the rows {other.row.name!r} and {unit.row.name!r} differ only in {named[0]}, "
                "which does not tell runs apart; give each its own --out"
            )
        if other.row.checkpoint != unit.row.checkpoint:
            raise ConfigError(
                f"the rows {other.row.name!r} and {unit.row.name!r} are one recipe with two "
                "checkpoints, and a run has the figures of one; evaluate the same, or give each "
                "its own --out"
            )


def check_data(units: Sequence[Unit]) -> None:
    """Raise DataError before anything runs if a data set is missing or damaged."""
    checked: list[Dataset] = []
    for unit in units:
        data = unit.resolved.recipe.data
        if data not in checked:
            data.load("test")
            checked.append(data)


def slow_units(units: Sequence[Unit]) -> list[str]:
    """Warnings of a precision that the device of these runs only emulates."""
    runs = [unit.resolved.recipe.run for unit in units]
    warnings = [slow_precision(run.precision, device_of(run.device)) for run in runs]
    return [text for text in dict.fromkeys(warnings) if text is not None]


class _Run(NamedTuple):
    """What identifies a run that is in the folder."""

    key: str  # of its recipe, as this version of jemkit resolves it
    start: Path | None  # the run whose weights it started from


def _existing(registry: Registry, out: Path) -> dict[Path, _Run]:
    """The runs in a folder; anything else is ignored."""
    runs = {}
    for config in sorted(out.glob("*/config.json"), reverse=True):
        if config.parent.is_symlink():
            continue
        try:
            resolved = complete(resolve(registry, config=config), registry)
            start = read_json(config).get("init_from")
            path = (out / start["path"]).resolve() if start else None  # a name in an export
        except (JemkitError, TypeError, LookupError):
            continue
        runs[config.parent] = _Run(_key(resolved), path)
    return runs


def grid(settings: Sequence[str]) -> list[dict[str, str]]:
    """Every combination of settings such as lr=0.1,0.2; values are separated by commas."""
    choices = []
    for setting in settings:
        name, equals, values = setting.partition("=")
        if not equals or not name.strip():
            raise ConfigError(f"--set {setting}: expected NAME=VALUE or NAME=VALUE,VALUE")
        choices.append([(name.strip(), value) for value in _split(values)])
    return [dict(combination) for combination in itertools.product(*choices)]


def _split(values: str) -> list[str]:
    """The parts of a text between commas outside of brackets and quotes."""
    parts = re.findall(r"""(?:\[[^\]]*\]|\{[^}]*\}|"[^"]*"|'[^']*'|[^,])+""", values)
    return [part.strip() for part in parts] or [""]


def _ordered(study: Study) -> Iterator[Row]:
    """The rows, each after the one that it starts from."""
    done: list[str] = []

    def visit(row: Row, path: tuple[str, ...]) -> Iterator[Row]:
        if row.name in path:
            raise ConfigError(
                f"the row {row.name!r} starts from itself: {' -> '.join([*path, row.name])}"
            )
        if row.name in done:
            return
        if row.after is not None:
            yield from visit(study.row(row.after), (*path, row.name))
        done.append(row.name)
        yield row

    for row in study.rows:
        yield from visit(row, ())


def merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Tables, the second over the first."""
    result = dict(one)
    for name, value in other.items():
        before = result.get(name)
        if isinstance(before, dict) and isinstance(value, dict):
            value = merged(before, value)
        result[name] = value
    return result


def _key(resolved: Resolved, before: str = "") -> str:
    settings = {
        key: value for key, value in flat(resolved.tables)
        if key not in SAME_IMAGES and not may_differ(key)
    }  # fmt: skip
    text = json.dumps([settings, before], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
