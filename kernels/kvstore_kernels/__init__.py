"""Triton kernels of KV pages: moved at the speed of a copy, attended to at the speed of a read.

Each kernel has a file of its own with its roofline, a launcher that checks its arguments, and a
reference in torch beside it. Nothing here knows of the store.
"""
