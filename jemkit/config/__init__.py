"""The registry of parts, layers of settings, recipes, optimizers and schedules.

May import: metrics and hookspecs, and what these import.
A new file: what reads or checks settings.
"""
