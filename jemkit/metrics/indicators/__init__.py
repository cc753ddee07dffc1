"""Failure indicators: signs that an accuracy under attack is higher than the truth."""

from jemkit.metrics.indicators.findings import Finding, at_least, surely
from jemkit.metrics.indicators.verdict import examine, outputs_of

__all__ = ["Finding", "at_least", "examine", "outputs_of", "surely"]
