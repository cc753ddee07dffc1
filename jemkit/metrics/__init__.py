"""Evaluators, figures with their intervals, the attack runner, records, charts.

May import: the core below it: data to step.
A new file: what measures a model; a measure that one plug-in has alone goes to that plug-in.
"""
