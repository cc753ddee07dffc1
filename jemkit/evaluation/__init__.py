"""Evaluating, comparing, sampling and exporting trained models; the report.

May import: training, and what training may import. A new file: code that reads finished runs.
"""

from jemkit.evaluation.evaluate import evaluate, judge

__all__ = ["evaluate", "judge"]
