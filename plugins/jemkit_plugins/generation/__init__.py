"""Generation: `evaluator` draws samples and compares them with the data.

It imports jemkit and its own folder; a new measure goes to `fid`, a new network to `features`.
"""

from jemkit_plugins.generation.evaluator import Generation, jemkit_evaluators

__all__ = ["Generation", "jemkit_evaluators"]
