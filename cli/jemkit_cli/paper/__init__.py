"""Figures and tables of runs for a paper: PDF, SVG and PNG, LaTeX and CSV.

`--figures` of `jemkit report` and `jemkit compare`. May import: the library, and
`jemkit_cli.results`.
"""
