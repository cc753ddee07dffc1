"""Failure indicators: signs that an accuracy under attack is higher than the truth.

`plan` chooses probes within a budget of passes, `probes` runs them, `findings` reads them,
`verdict` does so for every figure. A new indicator is a probe and a function of `findings`.
"""

from jemkit_plugins.indicators.verdict import examine, outputs_of

__all__ = ["examine", "outputs_of"]
