"""Failure indicators: signs that an accuracy under attack is higher than the truth."""

from jemkit.indicators.findings import Finding, at_least, surely
from jemkit.indicators.verdict import examine

__all__ = ["Finding", "at_least", "examine", "surely"]
