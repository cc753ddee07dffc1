"""One stage in its own process: `python stage.py NAME --out DIR --work DIR --seconds S`."""

import argparse
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from records import Record, about_machine

KIT = Path(__file__).resolve().parents[2]
sys.path.insert(1, str(KIT / "benchmarks"))


class Given(NamedTuple):
    """What a stage is told."""

    device: str  # cuda, or cpu in a rehearsal
    toy: bool  # smallest sizes, to see that all of it runs
    out: Path  # records
    work: Path  # everything else
    ends: float  # by time.monotonic

    @property
    def left(self) -> float:
        """Seconds until the stage's limit."""
        return self.ends - time.monotonic()

    def arguments(self) -> list[str]:
        """As options of `stage.py`, for a process that a stage starts."""
        words = ["--out", str(self.out), "--work", str(self.work), "--device", self.device]
        return [*words, *(["--toy"] if self.toy else []), "--seconds", f"{self.left:.1f}"]


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--work", type=Path, required=True)
    options.add_argument("--seconds", type=float, required=True)
    options.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options.add_argument("--toy", action="store_true")
    options.add_argument("--result", type=Path, help="where a child of a stage writes its result")
    return options


def given_of(options: argparse.Namespace) -> Given:
    ends = time.monotonic() + options.seconds
    return Given(options.device, options.toy, options.out, options.work, ends)


def say(result: dict[str, Any], path: Path) -> None:
    """Write what a child of a stage measured, whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result))
    part.replace(path)


def main() -> None:
    options = parser()
    options.add_argument("name")
    parsed = options.parse_args()
    given = given_of(parsed)
    record = Record(given.out / f"{parsed.name}.json", stage=parsed.name, toy=parsed.toy)
    record.add(machine=about_machine())
    importlib.import_module(f"stage_{parsed.name}").measure(given, record)


if __name__ == "__main__":
    main()
