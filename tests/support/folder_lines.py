"""What is read of a folder of images, and what the log says of it."""

import logging
from pathlib import Path

import pytest

from jemkit_plugins.folder import Folder


def counts(root: Path) -> dict[str, int]:
    return {split: len(Folder(dir=root).load(split).y) for split in ("train", "test")}  # type: ignore[arg-type]


def said(caplog: pytest.LogCaptureFixture, root: Path) -> str:
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="jemkit.data"):
        Folder(dir=root).load("train")
        Folder(dir=root).load("test")
    (line,) = [record.getMessage() for record in caplog.records]
    return line
