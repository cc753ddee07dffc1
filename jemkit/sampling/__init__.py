"""Kernels, initial distributions, the replay buffer and the density that chains draw from.

May import: errors, options, runtime, data and models.
A new file: a part of a Markov chain that several methods use.
"""
