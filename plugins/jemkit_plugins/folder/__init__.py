"""Folders of image files: `dataset` is the data set `folder`.

`layout` finds the splits and classes, `listing` the image files, `pixels` decodes them. It imports
jemkit and its own folder; a new image format goes to `layout` and `pixels`.
"""

from jemkit_plugins.folder.dataset import Folder, jemkit_datasets

__all__ = ["Folder", "jemkit_datasets"]
