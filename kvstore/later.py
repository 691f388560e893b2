"""Names of a package that are imported once somebody asks for them.

Who wants one module of a package runs the package's `__init__` too. What stands there would
otherwise be paid by every process: most of it is Numba, which a command that shows settings, or a
process that only moves bytes, has no use for.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence


def later(package: str, names: Mapping[str, Sequence[str]]) -> Callable[[str], object]:
    """The `__getattr__` of a package: its public names, by the module that has them, and the
    modules in it.

    Type checkers cannot see through it; they read the same imports beside it.
    """
    module_of = {name: module for module, theirs in names.items() for name in theirs}

    def attribute(name: str) -> object:
        module = module_of.get(name)
        if module is None:
            return _submodule(package, name)
        value: object = getattr(importlib.import_module(module), name)
        setattr(sys.modules[package], name, value)
        return value

    return attribute


def _submodule(package: str, name: str) -> object:
    wanted = f"{package}.{name}"
    try:
        if not name.startswith("__"):
            return importlib.import_module(wanted)
    except ModuleNotFoundError as error:
        if error.name != wanted:
            raise
    raise AttributeError(f"module {package!r} has no attribute {name!r}")
