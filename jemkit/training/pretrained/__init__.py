"""Checkpoints of the methods' authors, read without running anything in them."""

from jemkit.training.pretrained.importing import Imported, import_checkpoint
from jemkit.training.pretrained.layouts import FORMATS, Format
from jemkit.training.pretrained.reading import read_checkpoint

__all__ = ["FORMATS", "Format", "Imported", "import_checkpoint", "read_checkpoint"]
