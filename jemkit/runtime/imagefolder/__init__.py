"""Folders of image files: their layout, their files, and their pixels."""
