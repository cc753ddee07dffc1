"""Attack protocols, PGD, AutoAttack, random search, purification, and PixelModel.

They may import what sampling may, and sampling. An attack of the core goes here; others are
plug-ins.
"""
