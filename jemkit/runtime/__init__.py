"""Devices, files, processes, memory: knows torch, and no method.

May import: errors and options.
A new file: what serves a run whatever its method.
"""
