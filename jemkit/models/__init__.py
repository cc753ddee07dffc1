"""Networks, norms, energies and distances.

They may import errors, options, runtime and data. A module with weights, or what reads its
outputs, goes here.
"""
