"""Many stores as one: who is a member, where blocks belong, how copies are made and found again.

Everything here decides and nothing touches the world: coroutines that await what `world` offers,
so the same code runs on an event loop and, under a seed, in a simulation.
"""
