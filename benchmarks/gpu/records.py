"""The measurements of a stage, as one JSON file that is complete at any time."""

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("jemkit", "torch", "torchvision", "triton", "numpy", "pydantic", "pyautoattack")


def about_machine() -> dict[str, Any]:
    """Device, driver's CUDA and versions; torch is imported here."""
    import torch

    facts: dict[str, Any] = {
        "device": "cpu",
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        facts |= {
            "device": gpu.name,
            "memory_gib": round(gpu.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return facts


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


class Record:
    """A stage's record; every `add` writes the whole file, so that a killed stage leaves one."""

    def __init__(self, path: Path, **header: Any) -> None:
        self.path = path
        self.content: dict[str, Any] = dict(header)
        self.write()

    @classmethod
    def read(cls, path: Path) -> dict[str, Any]:
        """A record's content; empty where there is none."""
        return json.loads(path.read_text()) if path.exists() else {}

    def add(self, **figures: Any) -> None:
        self.content |= figures
        self.write()

    def write(self) -> None:
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.content, indent=1) + "\n")
        part.replace(self.path)  # whole or not at all
