"""Checkpoints of the methods' authors, read without running anything in them.

May import: config, and what config may import.
A new file: a reader of others' weights.
"""

from jemkit.training.pretrained.importing import Imported, import_checkpoint
from jemkit.training.pretrained.layouts import FORMATS, Format
from jemkit.training.pretrained.reading import read_checkpoint, read_state_dict

__all__ = [
    "FORMATS", "Format", "Imported", "import_checkpoint", "read_checkpoint", "read_state_dict",
]  # fmt: skip
