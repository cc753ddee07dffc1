"""Kernels, initial distributions, the replay buffer and the density that chains draw from.

They may import what models may, and models. A part of a Markov chain goes here.
"""
