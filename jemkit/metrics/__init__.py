"""Evaluators, figures with their intervals, the attack runner, records, charts.

May import: the layers below, from data to step. A new file: code that measures a model; a measure
that only one plug-in uses goes to that plug-in.
"""
