"""Folders of runs: `jemkit ls` and `jemkit rm`.

Read without torch, so that both are fast. May import: the layers of `jemkit` that do without it.
"""
