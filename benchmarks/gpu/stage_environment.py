"""Checks the packaged jemkit, its parts, the device and the compiler."""

import shutil
import sysconfig
from pathlib import Path

import torch
from records import Record
from stage import Given


def measure(given: Given, record: Record) -> None:
    import jemkit
    from jemkit.config.registry import installed

    site = given.work / "site"
    if not str(jemkit.__file__).startswith(str(site)):
        raise RuntimeError(f"jemkit came from {jemkit.__file__}, not from the kit in {site}")
    registry = installed(third_party=False)
    parts = {
        kind: sorted(registry[kind]) for kind in ("backbone", "objective", "updater", "attack")
    }
    compilers = {name: shutil.which(name) for name in ("c++", "g++", "gcc", "clang")}
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    record.add(parts=parts, compilers=compilers, python_headers=headers.exists())
    if registry.faults:
        raise RuntimeError(f"plug-ins that do not load: {registry.faults}")
    if not all(parts.values()):
        raise RuntimeError("the registry is empty: jemkit must be installed from its wheel")
    x = torch.rand(64, 64, device=given.device)
    record.add(product_is_finite=bool((x @ x).isfinite().all()))
