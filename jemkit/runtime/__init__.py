"""Devices, files, processes, memory: knows torch, and no method.

It may import errors and options. What serves a run whatever its method goes here.
"""
