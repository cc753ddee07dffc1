"""Evaluators, figures with their intervals, the attack runner, records, plots.

They may import the core below them: data to step. What measures a model goes here; a measure
that one plug-in has alone goes to that plug-in.
"""
