"""Folders of image files: how they are ordered, what lies in them, and their pixels.

May import: errors, options and runtime.
A new file: what reads images for the data set `folder`.
"""
