"""The versions of constraints.txt can be installed together, and pyproject.toml allows them."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = {
    canonicalize_name(name): pin
    for name, pin in re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
}


def refused(needed: list[str]) -> list[str]:
    """The requirements that a pin contradicts, without those of extras."""
    wanted = [r for r in map(Requirement, needed) if r.marker is None or r.marker.evaluate()]
    pins = {r: PINS.get(canonicalize_name(r.name)) for r in wanted}
    return [f"{r}, pinned {pin}" for r, pin in pins.items() if pin and pin not in r.specifier]


def test_every_package_that_make_installs_is_pinned_within_its_range() -> None:
    installed = re.findall(r"'\.\[([\w,]+)\]'", (ROOT / "Makefile").read_text())
    assert installed
    extras = {extra for extras in installed for extra in extras.split(",")}
    parts = [PROJECT["optional-dependencies"][extra] for extra in sorted(extras)]
    needed = [r for part in [PROJECT["dependencies"], *parts] for r in part]
    assert [r for r in needed if canonicalize_name(Requirement(r).name) not in PINS] == []
    assert refused(needed) == []


def test_no_pinned_package_refuses_the_pin_of_another() -> None:
    clashes = {}
    for name, pin in PINS.items():
        try:
            if version(name) == pin:  # what another version needs is of no matter
                clashes[name] = refused(requires(name) or [])
        except PackageNotFoundError:
            continue
    assert {name: r for name, r in clashes.items() if r} == {}
