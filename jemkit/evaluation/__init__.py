"""Evaluating, comparing, sampling and exporting what was trained; the report.

May import: training, and what training may import.
A new file: what reads finished runs.
"""

from jemkit.evaluation.evaluate import evaluate, judge

__all__ = ["evaluate", "judge"]
