"""The registry of parts, layers of settings, recipes, optimizers and schedules.

They may import metrics and hookspecs, and what these may. What reads or checks settings goes here.
"""
