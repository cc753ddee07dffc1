"""Studies: many runs under one protocol, and their table.

`plan` reads a study and resolves its runs, `running` trains and evaluates what is missing, `table`
computes the figures, `writing` formats them, `forecast` times a few steps.
"""
