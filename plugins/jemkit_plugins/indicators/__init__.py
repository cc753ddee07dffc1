"""Failure indicators: signs that an accuracy under attack is too high.

`plan` selects probes within a budget of passes, `probes` runs them, `findings` interprets them, and
`verdict` does so for every figure. A new indicator is a probe and a function in `findings`.
"""

from jemkit_plugins.indicators.verdict import examine, outputs_of

__all__ = ["examine", "outputs_of"]
