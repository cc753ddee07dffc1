"""The report: one HTML file that holds all there is to see of one or several runs."""

from jemkit.evaluation.report.page import render, write

__all__ = ["render", "write"]
