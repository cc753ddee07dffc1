"""LAS-AT: the objective `lasat`, whose attacks are chosen by a strategy network.

It imports jemkit and its own folder; a new form goes to `forms`, a new reward to `reward`.
"""

from jemkit_plugins.lasat.options import LASAT, jemkit_objectives

__all__ = ["LASAT", "jemkit_objectives"]
