"""One module for each system: `start` runs its servers, `Client` is one client process of it.

A module is imported by its system's own Python environment, so it may import that system, numpy
and the standard library, at the top only the latter two.
"""
