"""The record of an evaluation, and how another evaluation is added to it.

A record belongs to one model and one data set. For another model or data set a new record is
started, and the previous one is kept as evaluation-<8 hex>.json until it is evaluated again. Within
a record a figure is identified by its whole protocol (`Figure.key`): a figure with the same key is
replaced, any other is added.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jemkit.errors import DataError
from jemkit.metrics.evaluator import Context, Notes
from jemkit.metrics.figures import Figure, canonical, finite, without_results
from jemkit.metrics.record_file import (
    JSON,
    PICTURES,
    ROWS,
    STEM,
    Kind,
    Part,
    Record,
    beside,
    every,
    load,
    pictures,
    preferred,
    settle,
    write,
)
from jemkit.runtime.files import set_aside, write_bytes, write_tensors
from jemkit.runtime.lock import EVALUATION_LOCK, locked
from jemkit.runtime.opening import make_folder, refuse_links

__all__ = [
    "JSON", "LOCK", "PICTURES", "ROWS", "STEM", "Part", "Record", "arranged", "beside", "every",
    "finite", "left_by", "load", "of_weights", "part", "pictures", "save",
]  # fmt: skip

log = logging.getLogger(__name__)
WORK = ".evaluation"  # unfinished work of an evaluation, next to its record
LOCK, PATIENCE = EVALUATION_LOCK, 60.0  # held while a record is merged; seconds of waiting

ADVERSARIAL = "adversarial-"
KINDS: tuple[Kind, ...] = ("tables", "rows")

Owner = tuple[Any, Any, str | None]  # model's hash, network of weights alone, test images


def save(folder: Path, record: Record, notes: Notes, *, adversarial: bool = False) -> Path:
    """Write a record to a folder, merged with the figures of the same model and data.

    Only figures with the same protocol are replaced. The record of another model or other data is
    kept under another name. Concurrent evaluations merge into what the previous one wrote. With
    `adversarial` the attacked images are written too, [N, C, H, W] float32 in [0, 1], one file per
    attack.
    """
    folder.mkdir(parents=True, exist_ok=True)
    check_place(folder)
    with locked(folder / LOCK, f"writes its {JSON}", patience=PATIENCE):
        settle(folder)
        record = replace(record, parts=record.owned(notes.pictures))
        owner = _owner(record)
        warned: list[str] = []
        stem = _stem(owner)
        mine = _loaded(folder, stem, warned)
        other = _loaded(folder, STEM, warned)
        if other is not None and _owner(other) == owner:
            mine = _joined(other, mine)
        elif other is not None:  # another model, or other data: under a name of its own
            name = _stem(_owner(other))
            write(folder, _joined(other, _loaded(folder, name, warned)), name)
            log.warning("the record of another model, or of other images, is kept as %s.json", name)
        if mine is None:
            record = replace(record, pictures=stem if beside(folder) else PICTURES)
        notes.warnings.extend(w for w in warned if w not in notes.warnings)
        warnings = list(dict.fromkeys([*record.warnings, *notes.warnings]))
        whole = _joined(replace(record, warnings=warnings), mine)
        _write_files(folder, whole, record, notes, adversarial=adversarial)
        write(folder, whole)
        _drop_files(folder, mine, whole)
        for end in (".json", ".safetensors"):  # it is evaluation.json again
            (folder / f"{stem}{end}").unlink(missing_ok=True)
    return folder / JSON


def left_by(notes: Notes) -> dict[Kind, dict[str, Any]]:
    """The notes of evaluators so far; `part` returns what another one adds."""
    attacked = {f"{ADVERSARIAL}{label}": x for label, x in notes.adversarial.items()}
    files = {**notes.pictures, **attacked}
    return {"tables": dict(notes.tables), "rows": dict(notes.rows), "files": files}


def part(
    evaluator: str, figures: list[Figure], ctx: Context, before: Mapping[Kind, Mapping[str, Any]]
) -> Part:
    """What an evaluator left since `before`, with its figures."""
    keys = tuple(figure.key for figure in figures)
    owned: dict[Kind, dict[str, str]] = {}
    for kind, left in left_by(ctx.notes).items():
        old = before[kind]
        owned[kind] = {n: n for n, value in left.items() if n not in old or old[n] is not value}
    card = canonical(finite(without_results(ctx.card)))
    text = json.dumps([evaluator, card, keys], default=str)
    key = hashlib.sha256(text.encode()).hexdigest()
    return Part(evaluator, key, keys, owned["tables"], owned["rows"], owned["files"])


def check_place(folder: Path) -> None:
    """Reject a path that is not a folder, or whose record would be written through links."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise DataError(f"{there} is a file; --out must be a folder, such as --out judged")
    pictures = (path.name for path in folder.glob(f"{PICTURES}*") if path.is_dir())
    refuse_links(folder, (LOCK, WORK, PICTURES, *pictures))


def of_weights(
    folder: Path, sha256: str, data: str | None = None, test_sha256: str | None = None
) -> Record | None:
    """The record of these weights in a folder, if any; evaluation.json is tried first.

    If `data` is given, only a record of this data set is returned; if `test_sha256` is known, only
    one of exactly these test images. A damaged record other than evaluation.json is skipped with a
    warning.
    """
    if not (folder / JSON).exists():
        return None
    for stem in (STEM, *beside(folder)):
        try:
            record = load(folder, stem)
        except DataError as error:
            if stem == STEM:
                raise
            log.warning("%s.json is skipped: %s", stem, error)
            continue
        judged = record.protocol.get("test_sha256")
        same_data = data is None or record.subject.get("data", data) == data
        if test_sha256 is not None and judged is not None:
            same_data = judged == test_sha256
        if record.subject.get("sha256") == sha256 and same_data:
            return record
    return None


def _owner(record: Record) -> Owner:
    """The model of a record; bare weights are identified together with their network."""
    network = record.subject.get("network")
    named = network if isinstance(network, str) else None
    return record.subject.get("sha256"), named, record.protocol.get("test_sha256")


def _stem(owner: Owner) -> str:
    return f"{STEM}-{hashlib.sha256(json.dumps(owner).encode()).hexdigest()[:8]}"


def _loaded(folder: Path, stem: str, warned: list[str]) -> Record | None:
    """A record to be merged; a damaged one is renamed, and a new one replaces it."""
    if not (folder / f"{stem}.json").exists():
        return None
    try:
        return load(folder, stem)
    except DataError as error:
        aside = set_aside(folder / f"{stem}.json")
        warned.append(f"the previous record is kept as {aside.name}: {error}")
        return None


def _joined(new: Record, old: Record | None) -> Record:
    """The figures of both records, one per protocol, each with what belongs to it."""
    if old is None:
        return arranged(new)
    old = _without(old, {f.key for f in new.figures}, keys={part.key for part in new.parts})
    measured = {figure.protocol.get("evaluator") for figure in new.figures}
    left_out = {k: v for k, v in old.left_out.items() if k not in measured}
    before = old.warnings if old.figures else []
    whole = replace(
        new,
        left_out={**left_out, **new.left_out},
        warnings=list(dict.fromkeys([*before, *new.warnings])),
        pictures=old.pictures,
    )
    return arranged(whole, old)


def _without(
    record: Record, gone: Set[str], *, keys: Set[str] = frozenset(), tables: bool = True
) -> Record:
    """A record without some figures and what belongs only to them.

    A part is removed with the last of its figures; a part that never had any is removed if its key
    is in `keys`.
    """
    parts, tables_left = [], dict(record.tables)
    for part in record.parts:
        left = tuple(key for key in part.figures if key not in gone)
        if not left and (part.figures or part.key in keys):
            continue
        names = {f.name for f in record.figures if f.key in part.figures and f.key in gone}
        rows = {name: stored for name, stored in part.rows.items() if name not in names}
        own = {f.name for f in record.figures if f.key in part.figures}
        for stored in part.tables.values():  # a table may have an entry for each figure
            if isinstance(tables_left[stored], dict) and tables_left[stored].keys() <= own:
                tables_left[stored] = {
                    k: v for k, v in tables_left[stored].items() if k not in names
                }
        own_tables = part.tables if tables else {}
        parts.append(part._replace(figures=left, rows=rows, tables=own_tables))
    figures = [figure for figure in record.figures if figure.key not in gone]
    return replace(record, figures=figures, parts=parts, tables=tables_left)


def arranged(new: Record, old: Record | None = None) -> Record:
    """The new record with the old one's figures, and names that no two parts share.

    The plain name is that of the preferred figure's part; the others end in @ and the beginning
    of their part's key. A file that is there keeps its name.
    """
    figures = [*new.figures, *(old.figures if old else ())]
    sources = [(part, new) for part in new.parts]
    sources += [(part, old) for part in old.parts] if old else []
    files = {stored for part in (old.parts if old else ()) for stored in part.files.values()}
    tables: dict[str, Any] = {}
    rows: dict[str, Tensor] = {}
    parts = []
    for part, of in sources:
        end = f"@{part.key[:8]}"
        names: dict[Kind, dict[str, str]] = {}
        for kind in KINDS:
            first = {n: _first(kind, n, figures, sources) is part for n in part.names(kind)}
            names[kind] = {n: n if plain else n + end for n, plain in first.items()}
        named = Part(part.evaluator, part.key, part.figures, names["tables"], names["rows"])
        own = {n: n + end if stored in files else stored for n, stored in part.files.items()}
        parts.append(named._replace(files=own if of is new else part.files))
        tables |= {names["tables"][n]: of.tables[stored] for n, stored in part.tables.items()}
        rows |= {names["rows"][n]: of.rows[stored] for n, stored in part.rows.items()}
    return replace(new, figures=figures, tables=tables, rows=rows, parts=parts)


def _first(
    kind: Kind, name: str, figures: list[Figure], sources: list[tuple[Part, Record]]
) -> Part:
    """The part whose table or rows have the plain name."""
    having = [part for part, _ in sources if name in part.names(kind)]
    keys = {key: part for part in reversed(having) for key in part.figures}
    owned = [f for f in figures if f.key in keys]
    of_name = [f for f in owned if f.name == name]
    if not owned:
        return having[0]
    return keys[preferred(of_name or owned).key]


def _write_files(
    folder: Path, whole: Record, record: Record, notes: Notes, *, adversarial: bool
) -> None:
    """Pictures, and attacked images where they are wanted, under their names in the record."""
    new = {part.key for part in record.parts}
    names = {n: stored for p in whole.parts if p.key in new for n, stored in p.files.items()}
    if notes.pictures or adversarial:
        make_folder(folder / whole.pictures)
    for name, png in notes.pictures.items():
        write_bytes(folder / whole.pictures / f"{names.get(name, name)}.png", png)
    for label, x_adv in notes.adversarial.items() if adversarial else ():
        name = names.get(f"{ADVERSARIAL}{label}", f"{ADVERSARIAL}{label}")
        right = record.rows[label].to(torch.uint8)
        path = folder / whole.pictures / f"{name}.safetensors"
        write_tensors(path, {"x_adv": x_adv, "right": right})


def _drop_files(folder: Path, before: Record | None, whole: Record) -> None:
    """Remove plots of figures that were measured again and have new plots."""
    left = {stored for part in whole.parts for stored in part.files.values()}
    gone = {s for part in (before.parts if before else ()) for s in part.files.values()} - left
    for stored in gone:
        for end in (".png", ".safetensors"):
            (folder / whole.pictures / f"{stored}{end}").unlink(missing_ok=True)
