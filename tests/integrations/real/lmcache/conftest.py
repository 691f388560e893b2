"""Lets these tests import LMCache: pytest names a folder's modules after it, and this one's name is
that of LMCache's package."""

import sys

sys.modules.pop("lmcache", None)

import lmcache  # noqa: E402, F401
