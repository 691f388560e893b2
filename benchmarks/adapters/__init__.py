"""One module for each system: `start` runs its servers, `Client` is one client process of it.

NAME is the column's head, REQUIREMENTS and WITHOUT_DEPENDENCIES make its environment (see
`environment_for`), SHARED = False says that several clients would share nothing, and CHAINED = True
that it finds blocks only in the order in which one put stored them. What `start` yields goes to
each client; its "version" is reported.

A module is imported by its system's own Python environment, so it may import that system, numpy
and the standard library, at the top only the latter two.
"""
