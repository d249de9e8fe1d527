"""Callbacks and recipes for the libraries that people train with; each module imports its library, nothing else does.

Holds: one module or package for each library. Elsewhere: what they call, which knows none of them (engine, checkpoint).
"""
