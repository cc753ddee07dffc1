"""Checkpoints of the methods' authors, read without running anything in them."""

from jemkit.foreign.importing import Imported, import_checkpoint
from jemkit.foreign.layouts import FORMATS, Format
from jemkit.foreign.reading import read_checkpoint

__all__ = ["FORMATS", "Format", "Imported", "import_checkpoint", "read_checkpoint"]
