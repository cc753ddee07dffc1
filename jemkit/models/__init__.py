"""Networks, norms, energies and distances.

May import: errors, options, runtime and data.
A new file: a module with weights, or what reads its outputs.
"""
