"""Evaluating, comparing, sampling and exporting what was trained; the report.

It may import training, and what training may. What reads finished runs goes here.
"""

from jemkit.evaluation.evaluate import evaluate, judge

__all__ = ["evaluate", "judge"]
