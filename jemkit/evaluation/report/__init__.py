"""The report: one HTML file with figures, charts and samples of one or several runs.

May import: evaluation, and what evaluation may import. A new file: a section of the page, listed in
`page.SECTIONS`.
"""

from jemkit.evaluation.report.page import read_book, render, write

__all__ = ["read_book", "render", "write"]
