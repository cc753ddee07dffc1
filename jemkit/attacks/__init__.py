"""Attack protocols, PGD, ascents, AutoAttack, purification, and PixelModel.

May import: errors, options, runtime, data, models and sampling.
A new file: an attack that other parts of the library run; every other attack is a plug-in.
"""
