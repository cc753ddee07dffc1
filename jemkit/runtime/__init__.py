"""Devices, files, processes, memory: uses torch, and knows no method.

It may import errors and options. Code that serves any run, whatever its method, goes here.
"""
