"""The ops, one folder each: checks, reference, registration, and the kernels of every backend."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType


def modules(name: str) -> list[ModuleType]:
    """The modules called ``name`` of all ops that have one."""
    found = []
    for op in pkgutil.iter_modules(__path__):
        package = importlib.import_module(f"{__name__}.{op.name}")
        if any(module.name == name for module in pkgutil.iter_modules(package.__path__)):
            found.append(importlib.import_module(f"{package.__name__}.{name}"))
    return found
