"""Folders of image files: how they are ordered, what lies in them, and their pixels."""
